"""A linear in NF4 whose codes stay as they are while its scales are trained."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from nybble.calibrate.finished import PreparedLinear
from nybble.ops.nf4 import by_block
from nybble.quant.format import NF4Spec
from nybble.quant.rounding import StoredAbsmax
from nybble.quant.weight import NF4Weight


class TunedScales(nn.Module):
    """Computes with `absmax`, fp32 (blocks,), which is what it was, times 1 + change, as it can be stored.

    `change` is what an optimizer moves: one of the same size is as much to every block. Where scales are stored in 8
    bits the gradient passes straight through to it, and the second level stays as it was.
    """

    codes: Tensor
    start: Tensor
    group_absmax: Tensor | None
    offset: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: NF4Weight, bias: Tensor | None, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.spec, self.compute_dtype = weight.shape, weight.spec, compute_dtype
        self.register_buffer("codes", weight.codes)
        self.register_buffer("start", weight.single_level().absmax)
        self.register_buffer("group_absmax", weight.group_absmax)
        self.register_buffer("offset", weight.offset)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.absmax = nn.Parameter(self.start.clone())
        self.change = nn.Parameter(torch.zeros_like(self.start))

    def forward(self, x: Tensor) -> Tensor:
        x, bias, single = x.to(self.compute_dtype), self.bias, NF4Spec(self.spec.block_size, 0)
        unscaled = NF4Weight(self.codes, torch.ones_like(self.start), None, None, self.shape, single)
        level = by_block(unscaled.dequantize(torch.float32).view(-1), self.spec.block_size)
        flat = (level * self.absmax[:, None]).view(-1)[: unscaled.numel]
        weight = flat.view(self.shape).to(self.compute_dtype)
        return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))

    def pass_gradient(self) -> None:
        """To `change`, from `absmax`; none comes where no token did."""
        self.change.grad = None if self.absmax.grad is None else self.absmax.grad.mul_(self.start)
        self.absmax.grad = None

    def follow(self) -> None:
        """Have `absmax` as near to the change as it can be stored."""
        self.absmax.data.copy_(self._stored().values)

    def trained(self, prepared: PreparedLinear) -> PreparedLinear:
        """The same with these scales."""
        return replace(prepared, weight=self._stored().weight(self.codes, self.shape, self.spec))

    def _stored(self) -> StoredAbsmax:
        wanted = self.start * (1 + self.change.detach())
        as_were = StoredAbsmax(self.start, self.group_absmax, self.offset, self.start)
        absmax, values = as_were.nearest(wanted, slice(None), self.spec)
        return StoredAbsmax(absmax, self.group_absmax, self.offset, values)
