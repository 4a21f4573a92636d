"""A tensor in NF4: storage only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from nybble.errors import UserError
from nybble.ops.nf4 import absmax_dequantize, absmax_quantize, nf4_dequantize, nf4_dequantize_stack_, nf4_quantize
from nybble.quant.format import NF4Spec


@dataclass(frozen=True)
class NF4Weight:
    """The bytes of a quantized weight of `shape`.

    codes uint8 (ceil(numel / 2),). With double quantization absmax is uint8 (blocks,), group_absmax fp32 (groups,) and
    offset fp32 (1,); without it absmax is fp32 (blocks,) and the other two are None.
    """

    codes: Tensor
    absmax: Tensor
    group_absmax: Tensor | None
    offset: Tensor | None
    shape: tuple[int, ...]
    spec: NF4Spec

    @classmethod
    def quantize(cls, tensor: Tensor, spec: NF4Spec) -> NF4Weight:
        """Quantize a floating-point tensor of any shape; raises UserError if it holds NaN or infinity."""
        codes, absmax = nf4_quantize(tensor.detach(), spec.block_size)
        return cls._with_second_level(codes, absmax, tuple(tensor.shape), spec)

    @classmethod
    def quantize_blocks(
        cls, blocks: Iterable[Tensor], shape: tuple[int, ...], spec: NF4Spec, *, device: torch.device | str
    ) -> NF4Weight:
        """The bytes that `quantize` makes of a tensor of `shape` on `device`, of which one block is held at a time.

        blocks: its values, row by row; each but the last a multiple of spec.block_size.
        """
        numel = prod(shape)
        codes = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=device)
        absmax = torch.empty(spec.num_blocks(numel), dtype=torch.float32, device=device)
        start = 0
        for block in blocks:
            assert start % spec.block_size == 0
            packed, peaks = nf4_quantize(block.detach(), spec.block_size)
            codes[start // 2 : start // 2 + len(packed)] = packed
            absmax[start // spec.block_size : start // spec.block_size + len(peaks)] = peaks
            start += block.numel()
            del block, packed, peaks  # before the next one comes
        assert start == numel
        return cls._with_second_level(codes, absmax, shape, spec)

    @classmethod
    def _with_second_level(cls, codes: Tensor, absmax: Tensor, shape: tuple[int, ...], spec: NF4Spec) -> NF4Weight:
        require_finite(absmax)
        if not spec.double_quant:
            return cls(codes, absmax, None, None, shape, spec)
        # Over all blocks at once: their mean is part of the second level.
        absmax_codes, group_absmax, offset = absmax_quantize(absmax, spec.group_size)
        return cls(codes, absmax_codes, group_absmax, offset, shape, spec)

    @classmethod
    def empty(cls, shape: tuple[int, ...], spec: NF4Spec, *, device: torch.device | str | None = None) -> NF4Weight:
        """Room for a weight of `shape`, with whatever bytes the memory had."""
        numel = prod(shape)
        codes = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=device)
        absmax = torch.empty(spec.num_blocks(numel), dtype=torch.uint8, device=device)
        if not spec.double_quant:
            return cls(codes, absmax.float(), None, None, shape, spec)
        group_absmax = torch.empty(spec.num_groups(numel), dtype=torch.float32, device=device)
        return cls(codes, absmax, group_absmax, group_absmax.new_empty(1), shape, spec)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight, `shape`, rounded once to `dtype`."""
        weight: Tensor = nf4_dequantize(
            self.codes,
            self.absmax,
            self.group_absmax,
            self.offset,
            block_size=self.spec.block_size,
            group_size=self.spec.group_size,
            shape=self.shape,
            dtype=dtype,
        )
        return weight

    def single_level(self) -> NF4Weight:
        """The same weight to the bit, with absmax in fp32; its codes are shared."""
        if self.group_absmax is None or self.offset is None:
            return self
        absmax = absmax_dequantize(self.absmax, self.group_absmax, self.offset, self.spec.group_size)
        return NF4Weight(self.codes, absmax, None, None, self.shape, NF4Spec(self.spec.block_size, 0))

    def rows(self, start: int, stop: int) -> NF4Weight:
        """Rows [start, stop) of a single-level weight, without a copy; the first must begin where a block does."""
        assert not self.spec.double_quant
        row_values, block_size = prod(self.shape[1:]), self.spec.block_size
        first, last = start * row_values, stop * row_values
        assert first % block_size == 0
        codes = self.codes[first // 2 : -(-last // 2)]
        absmax = self.absmax[first // block_size : -(-last // block_size)]
        return NF4Weight(codes, absmax, None, None, (stop - start, *self.shape[1:]), self.spec)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def to(self, device: torch.device | str) -> NF4Weight:
        """The same bytes there."""
        codes, absmax = self.codes.to(device), self.absmax.to(device)
        if self.group_absmax is None or self.offset is None:
            return NF4Weight(codes, absmax, None, None, self.shape, self.spec)
        return NF4Weight(codes, absmax, self.group_absmax.to(device), self.offset.to(device), self.shape, self.spec)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is held, without the parts that this spec does not have."""
        held = (self.codes, self.absmax, self.group_absmax, self.offset)
        return tuple(tensor for tensor in held if tensor is not None)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.numel


def require_finite(extremes: Tensor) -> None:
    """Raise UserError if a weight with these extremes, its own or its blocks', holds NaN or infinity."""
    if not bool(torch.isfinite(extremes).all()):
        raise UserError("holds NaN or infinite values, which cannot be quantized", fix="Check the model's files.")


def dequantize_stack_(out: Tensor, weights: Sequence[NF4Weight]) -> None:
    """Write `weights`, all of one spec, one behind the other to `out`, contiguous, rounded once to its dtype."""
    spec = weights[0].spec
    second_level = [[w.group_absmax, w.offset] for w in weights if w.group_absmax is not None]
    nf4_dequantize_stack_(
        out,
        [weight.numel for weight in weights],
        [weight.codes for weight in weights],
        [weight.absmax for weight in weights],
        [group_absmax for group_absmax, _ in second_level],
        [offset for _, offset in second_level],
        block_size=spec.block_size,
        group_size=spec.group_size,
    )
