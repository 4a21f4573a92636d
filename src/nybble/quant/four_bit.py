"""Four-bit formats in NF4's layout: FP4, as bitsandbytes stores it, and symmetric INT4 to compare with.

Two codes a byte, the even element in the high bits; one absmax a block, with double quantization in 8 bits. They differ
from NF4 by the 16 values that codes stand for; on normal weights NF4's lie best (`studies/formats.py` has the figures).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from nybble.ops.nf4 import LEVELS, absmax_dequantize, by_block, midpoints, pack
from nybble.quant.format import NF4Spec
from nybble.quant.rounding import StoredAbsmax
from nybble.quant.weight import require_finite

# A bit of sign, two of exponent, one of fraction, in twelfths of the largest; the two smallest are 0 and 1/16.
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


@dataclass(frozen=True)
class FourBitFormat:
    """name: bitsandbytes' quant_type where it has the format. levels: the value of each of the 16 codes, in [-1, 1].

    nearest: the code of each of fp32 values in [-1, 1], uint8.
    """

    name: str
    levels: tuple[float, ...]
    nearest: Callable[[Tensor], Tensor]

    def table(self, device: torch.device | str) -> Tensor:
        """The levels, fp32, by code."""
        return torch.tensor(self.levels, dtype=torch.float32, device=device)


def _nearest_nf4(unit: Tensor) -> Tensor:
    return torch.bucketize(unit, midpoints(NF4.table(unit.device)), out_int32=True).to(torch.uint8)


def _nearest_fp4(unit: Tensor) -> Tensor:
    """By magnitude, ties to the smaller one, with the sign in the highest bit; zero and what rounds to it keep theirs.

    So writes bitsandbytes' CUDA build. Its CPU build gives what rounds to zero the other zero, which reads the same.
    """
    magnitudes, codes = FP4.table(unit.device)[:8].sort()
    index = torch.bucketize(unit.abs(), midpoints(magnitudes), out_int32=True)
    return codes[index].to(torch.uint8) + 8 * (unit < 0).to(torch.uint8)


def _nearest_int4(unit: Tensor) -> Tensor:
    return (unit * 7).round().to(torch.int8).add(8).to(torch.uint8)


NF4 = FourBitFormat("nf4", LEVELS, _nearest_nf4)
FP4 = FourBitFormat("fp4", tuple(m / s for s in (12.0, -12.0) for m in _FP4_MAGNITUDES), _nearest_fp4)
# -7 to 7 in steps of absmax / 7; code 0, for -8, is not used: no value is beyond absmax.
INT4 = FourBitFormat("int4", tuple(step / 7 for step in range(-8, 8)), _nearest_int4)
FORMATS = {format.name: format for format in (NF4, FP4, INT4)}


@dataclass(frozen=True)
class FourBitWeight:
    """The bytes of a weight of `shape` in any of the formats.

    codes uint8 (ceil(numel / 2),). absmax, group_absmax and offset are as in `NF4Weight`.
    """

    codes: Tensor
    absmax: Tensor
    group_absmax: Tensor | None
    offset: Tensor | None
    shape: tuple[int, ...]
    spec: NF4Spec
    format: FourBitFormat

    @classmethod
    def quantize(cls, tensor: Tensor, spec: NF4Spec, format: FourBitFormat) -> FourBitWeight:
        """Quantize a floating-point tensor of any shape; raises UserError if it holds NaN or infinity."""
        blocks = by_block(tensor.detach().reshape(-1).float(), spec.block_size)
        absmax = blocks.abs().amax(1)
        require_finite(absmax)
        # The reciprocal is rounded before the product, as bitsandbytes does. A block of zeros gives 0 * inf: take 0.
        unit = torch.mul(blocks, absmax.reciprocal()[:, None]).nan_to_num_(0.0)
        codes = pack(format.nearest(unit).view(-1)[: tensor.numel()], zero=format.levels.index(0.0))
        stored = StoredAbsmax.of(absmax, spec)
        return cls(codes, stored.absmax, stored.group_absmax, stored.offset, tuple(tensor.shape), spec, format)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight, `shape`: level * absmax in fp32, rounded once to `dtype`."""
        absmax = self.absmax
        if self.group_absmax is not None and self.offset is not None:
            absmax = absmax_dequantize(absmax, self.group_absmax, self.offset, self.spec.group_size)
        index = torch.stack([self.codes >> 4, self.codes & 15], dim=1).view(-1)[: prod(self.shape)]
        level = self.format.table(self.codes.device)[index.int()]
        values = (by_block(level, self.spec.block_size) * absmax[:, None]).view(-1)[: level.numel()]
        return values.view(self.shape).to(dtype)

    @property
    def nbytes(self) -> int:
        held = (self.codes, self.absmax, self.group_absmax, self.offset)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / prod(self.shape)
