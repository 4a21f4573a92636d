"""y = base(x) + scaling * B A dropout(x): the adapter, and the layer that adds it to any frozen linear.

Legend: tokens = every dimension of x but the last; in, out = the base's features; r = rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from nybble.adapters.config import LoraConfig
from nybble.ops.linear import frozen_linear
from nybble.ops.lora import lora_linear

ADAPTER_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Row norms are taken in fp32 over blocks of this many bytes, so that DoRA needs no fp32 copy of a whole weight.
_NORM_BLOCK_BYTES = 32 * 2**20


class FrozenLinear(Protocol):
    """What an adapter needs of the layer that it adapts, whatever the format of its weight."""

    in_features: int
    out_features: int
    bias: Tensor | None
    compute_dtype: torch.dtype
    fan_in_fan_out: bool

    def dequantize(self, dtype: torch.dtype) -> Tensor: ...

    def stored(self) -> tuple[Tensor, ...]: ...

    def materialize(self, *stored: Tensor) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def __call__(self, x: Tensor) -> Tensor: ...


def is_frozen_linear(module: object) -> TypeGuard[FrozenLinear]:
    """Whether `module` is a linear layer of ours: these alone can rebuild their weight.

    Not isinstance: from Python 3.12 on that does not see what nn.Module keeps outside `__dict__`, such as bias.
    """
    return isinstance(module, nn.Module) and hasattr(module, "in_features") and hasattr(module, "dequantize")


class LoRAAdapter(nn.Module):
    """A low-rank pair for one linear layer, with a magnitude for each output row if it is DoRA (arXiv 2402.09353).

    lora_A (r, in), lora_B (out, r), magnitude (out,), held in the dtype of `config`. A starts as PEFT's does,
    uniform in +-1/sqrt(in); B starts at zero; the magnitude at the norms of the base's rows.
    """

    magnitude: nn.Parameter | None

    def __init__(self, base: FrozenLinear, config: LoraConfig, path: str, device: torch.device | None = None) -> None:
        """path: of `base` in its model. device: where the adapter lies, if not where the weights of `base` do."""
        super().__init__()
        own = config.at(path)
        self.config = config
        self.scaling = own.scaling
        self.dropout = nn.Dropout(own.lora_dropout)
        self.trainable = True
        held = next(base.parameters()).new_empty(0, dtype=ADAPTER_DTYPES[own.dtype], device=device)
        self.lora_A = nn.Parameter(held.new_empty(own.r, base.in_features))
        self.lora_B = nn.Parameter(held.new_zeros(base.out_features, own.r))
        self.magnitude = nn.Parameter(held.new_empty(base.out_features)) if own.use_dora else None

    @torch.no_grad()
    def initialize(self, base: FrozenLinear, generator: torch.Generator) -> None:
        """Draw A from `generator` (on the CPU, so that every device starts from the same numbers)."""
        # kaiming_uniform_(a=sqrt(5)) spelt out: its bound is 1 / sqrt(fan_in).
        bound = 1 / math.sqrt(self.lora_A.shape[1])
        start = torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator)
        self.lora_A.copy_(start)
        self.lora_B.zero_()
        if self.magnitude is not None:
            self.magnitude.copy_(self.row_norms(base.dequantize(torch.float32)))

    def forward(self, x: Tensor, base: FrozenLinear) -> Tensor:
        """The adapted output (tokens, out) for x (tokens, in), in the base's compute dtype."""
        x = x.to(base.compute_dtype)
        if self.magnitude is not None:
            return self._dora(x, base, self.magnitude)
        if self.training and self.dropout.p > 0:  # base and pair read different inputs
            return base(x) + self.low_rank(self.dropout(x))
        bias = None if base.bias is None else base.bias.to(x.dtype)
        return lora_linear(x, (self.lora_A, self.lora_B, self.scaling), bias, base.materialize, *base.stored())

    def low_rank(self, x: Tensor) -> Tensor:
        """scaling * B A x in the dtype of x, (tokens, out)."""
        # The factor goes to the narrow side: r values a token instead of out.
        return nn.functional.linear(
            nn.functional.linear(x, self.lora_A.to(x.dtype)) * self.scaling, self.lora_B.to(x.dtype)
        )

    def _dora(self, x: Tensor, base: FrozenLinear, magnitude: Tensor) -> Tensor:
        weight = _SharedWeight(base)
        # Section 4.3 of the paper: the norm follows the weights but gets no gradient.
        scale = magnitude.float() / self.row_norms(weight())
        output = unscaled = weight.linear(x)
        if self.training and self.dropout.p > 0:
            # As in PEFT, what dropout removes from the adapter's input it removes from the rescaled base as well.
            x = self.dropout(x)
            unscaled = weight.linear(x)
        weight.release()
        output = output + (scale - 1).to(x.dtype) * unscaled + scale.to(x.dtype) * self.low_rank(x)
        return output if base.bias is None else output + base.bias.to(x.dtype)

    @torch.no_grad()
    def row_norms(self, weight: Tensor) -> Tensor:
        """||W + scaling * B A|| of each row, (out,) in fp32; `weight` is (out, in)."""
        rows = max(1, _NORM_BLOCK_BYTES // (4 * weight.shape[1]))
        A, B = self.lora_A.float(), self.lora_B.float()
        starts = range(0, weight.shape[0], rows)
        blocks = (weight[i : i + rows].to(A) + self.scaling * (B[i : i + rows] @ A) for i in starts)
        return torch.cat([torch.linalg.vector_norm(block, dim=1) for block in blocks])

    def extra_repr(self) -> str:
        kind = "DoRA, " if self.magnitude is not None else ""
        return f"{kind}r={self.lora_A.shape[0]}, scaling={self.scaling:g}, dtype={self.lora_A.dtype}"


class AdapterSlot(nn.Module):
    """A layer of the model with what each adapter has for it, by name; at most one adapter is active."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.enabled = True

    @property
    def chosen(self) -> nn.Module | None:
        """What the active adapter has here; None where the base computes alone."""
        return self.adapters[self.active] if self.active is not None and self.enabled else None


class LoRALinear(AdapterSlot):
    """A frozen linear with low-rank adapters beside it."""

    def forward(self, x: Tensor) -> Tensor:
        adapter = self.chosen
        output: Tensor = self.base(x) if adapter is None else adapter(x, self.base)
        return output

    def __getattr__(self, name: str) -> Any:
        # Model code and losses ask a linear for in_features, weight, bias and the like. What would make this layer
        # pass for a plain frozen one, which leaves the adapter out, is not handed on.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in ("in_features", "out_features", "weight", "bias", "compute_dtype", "fan_in_fan_out"):
                raise
            return getattr(self.base, name)


def layer_generator(seed: int, path: str) -> torch.Generator:
    """The random numbers of the layer at `path`: they depend on the seed and the path, on no other layer or order."""
    digest = hashlib.sha256(f"{seed}:{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class _SharedWeight:
    """A base's weight in its compute dtype, materialized once for all that the forward pass does with it."""

    def __init__(self, base: FrozenLinear) -> None:
        self.base = base
        self.stored = base.stored()
        self.weight: Tensor | None = base.materialize(*self.stored)

    def __call__(self, *stored: Tensor) -> Tensor:
        return self.base.materialize(*stored) if self.weight is None else self.weight

    def linear(self, x: Tensor) -> Tensor:
        """x W^T, (tokens, out); backward materializes the weight again from what is stored."""
        return frozen_linear(x, None, self, *self.stored)

    def release(self) -> None:
        """Forget the weight: from here on, in the backward pass, it is materialized anew."""
        self.weight = None
