"""Linears that read one input (q, k and v; gate and up) as one matrix product, with their low-rank pairs beside it.

Of y = x W^T + bias + scaling * (x A^T) B^T a projection makes two parts, `base` = x W^T + bias and `narrow` = x A^T.
The kernel that reads y next adds the product with B while it has the values in registers: a pass of its own over
(tokens, out) took 0.77 ms a layer of 8B at 8k tokens on an H100, 5 % of a step. The gradient of x is treated alike.

Legend: tokens = batch * seq_len; in, out = the features of all linears together; r = rank; parts = pairs stacked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nybble.adapters.lora import LoRAAdapter, LoRALinear
from nybble.memory.layout import carve, starts_of
from nybble.models.fused.matrix import Linear, Rows8, frozen_matrix
from nybble.models.fused.reason import CannotFuseError
from nybble.models.fused.stacked import joined, stacked
from nybble.ops.low_rank import a_gradient_, low_rank_backward_
from nybble.ops.wide import wide_dtype
from nybble.quant.linear import DenseLinear, NF4Linear


@dataclass(frozen=True)
class Pair:
    """The low-rank pairs of a projection, stacked, in the compute dtype; `masters` are what is trained."""

    A: Tensor  # (parts * r, in)
    B: Tensor  # (out, r)
    scaling: float
    sizes: list[int]  # output features of each part
    a_masters: tuple[nn.Parameter, ...]
    b_masters: tuple[nn.Parameter, ...]

    @classmethod
    def of(cls, adapters: Sequence[LoRAAdapter], dtype: torch.dtype) -> Pair:
        a_masters = tuple(adapter.lora_A for adapter in adapters)
        b_masters = tuple(adapter.lora_B for adapter in adapters)
        A, B = (stacked(masters).to(dtype, copy=True) for masters in (a_masters, b_masters))
        return cls(A, B, adapters[0].scaling, [len(B) for B in b_masters], a_masters, b_masters)

    @property
    def parts(self) -> int:
        return len(self.sizes)

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        """Where each trained tensor has its place in A and B."""
        places = [*torch.split(self.A, self.B.shape[1]), *torch.split(self.B, self.sizes)]
        return list(zip(places, [*self.a_masters, *self.b_masters], strict=True))

    def a_gradients(self, d_narrow: Tensor, x: Tensor) -> list[Tensor | None]:
        """Gradients of the masters of A, from d_narrow (tokens, parts * r) and x (tokens, in). See `_Gradients`."""
        gradients = _Gradients.of(self.a_masters, self.A)
        a_gradient_(gradients.total, d_narrow, x)
        return gradients.new

    def backward(self, d_output: Tensor, narrow: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """d_narrow, with the scaling in it, and the gradients of the masters of B, from d_output (tokens, out)."""
        gradients = _Gradients.of(self.b_masters, self.B)
        d_narrow = low_rank_backward_(gradients.total, d_output, narrow, self.B, self.scaling, self.sizes)
        return d_narrow, gradients.new


def put_together(pairs: Sequence[Pair]) -> None:
    """Move A and B of all pairs into one piece of memory.

    One by one they were made among stacked masters, which an optimizer frees that makes its parameters flat; and a page
    that something lies on is not given back: 2 GiB of 70B at rank 64.
    """
    copies = [copy for pair in pairs for copy in (pair.A, pair.B)]
    memory = torch.empty(starts_of(copies)[-1], dtype=torch.uint8, device=copies[0].device if copies else None)
    for copy, place in zip(copies, carve(memory, copies), strict=True):
        copy.data = place.copy_(copy)


@dataclass(frozen=True)
class _Gradients:
    """Where the gradient of stacked masters is added, and what autograd is told of it.

    Masters that have gradients side by side in memory, in fp32 at least, get theirs there, by the kernel that makes
    them, and autograd is told nothing: that saves 448 small kernels a step in 8B.
    """

    total: Tensor  # (rows, columns) of all masters, fp32 at least
    masters: tuple[nn.Parameter, ...]
    there: bool

    @classmethod
    def of(cls, masters: tuple[nn.Parameter, ...], stacked: Tensor) -> _Gradients:
        wide = wide_dtype(stacked)
        held = [master.grad for master in masters if master.grad is not None]
        total = joined(held) if len(held) == len(masters) else None
        if total is not None and total.dtype == wide:
            return cls(total, masters, there=True)
        return cls(torch.zeros_like(stacked, dtype=wide), masters, there=False)

    @property
    def new(self) -> list[Tensor | None]:
        """The gradient of each master, once it is there."""
        if self.there:
            return [None] * len(self.masters)
        parts = torch.split(self.total, [len(master) for master in self.masters])
        return [part.to(master.dtype) for part, master in zip(parts, self.masters, strict=True)]


class Projection:
    """The linears of `modules`, each frozen or with an active adapter, as one. Arguments: see `frozen_matrix`."""

    def __init__(self, modules: Sequence[nn.Module], *, precision: str, device: torch.device, resident: bool) -> None:
        adapters = [module.chosen if isinstance(module, LoRALinear) else None for module in modules]
        linears = [_base(module) for module in modules]
        self.dtype = linears[0].compute_dtype
        self.matrix = frozen_matrix(linears, precision=precision, device=device, resident=resident)
        self.bias = _stacked_bias(linears, device)
        self.pair = _pair(adapters, self.dtype)

    def __call__(self, x: Tensor, rows8: Rows8 | None = None, *, replay: bool = False) -> tuple[Tensor, Tensor | None]:
        """Base output (tokens, out) and narrow (tokens, parts * r), None where nothing is adapted.

        rows8: as `FrozenMatrix.product` takes it. replay: only what a backward pass needs, so what lies in base is not
        defined.
        """
        base = self._undefined(x) if replay else self.matrix.product(x, self.bias, rows8)
        return base, None if self.pair is None else x @ self.pair.A.t()

    def _undefined(self, x: Tensor) -> Tensor:
        """What looks like base, without its memory: 16 MB of 8B at 2k tokens, and a block's replay is the peak."""
        return x.new_empty(1).expand(len(x), self.matrix.shape[0])

    def input_gradient(self, d_output: Tensor) -> Tensor:
        """The gradient of x (tokens, in) through the frozen weights alone."""
        return self.matrix.gradient(d_output)

    def b_gradients(self, d_output: Tensor, narrow: Tensor | None) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of narrow and of the masters of B from that of y; None and none where nothing is adapted."""
        return self.pair.backward(d_output, narrow) if self.pair and narrow is not None else (None, [])

    def a_gradients(self, d_narrow: Tensor | None, x: Tensor | None) -> list[Tensor | None]:
        """Gradients of the masters of A, from d_narrow and x (tokens, in)."""
        return self.pair.a_gradients(d_narrow, x) if self.pair and d_narrow is not None and x is not None else []

    @property
    def stored(self) -> list[nn.Parameter]:
        """What holds the frozen weights, in the order in which they are stacked."""
        stored = [tensor for linear in self.matrix.linears for tensor in linear.stored()]
        return [tensor for tensor in stored if isinstance(tensor, nn.Parameter)]

    @property
    def masters(self) -> tuple[nn.Parameter, ...]:
        """All that is trained of it, A first."""
        return (*self.pair.a_masters, *self.pair.b_masters) if self.pair else ()


def _base(module: nn.Module) -> Linear:
    linear = module.base if isinstance(module, LoRALinear) else module
    if not isinstance(linear, DenseLinear | NF4Linear):
        raise CannotFuseError(f"{type(linear).__name__} is not a linear layer")
    if any(parameter.requires_grad for parameter in linear.parameters()):
        raise CannotFuseError("weights of the base are trained")
    return linear


def _pair(adapters: Sequence[nn.Module | None], dtype: torch.dtype) -> Pair | None:
    present = [adapter for adapter in adapters if isinstance(adapter, LoRAAdapter)]
    if not present:
        return None
    if len(present) < len(adapters):
        raise CannotFuseError("an adapter has some of the linears that read one input, and not all")
    if any(adapter.magnitude is not None for adapter in present):
        raise CannotFuseError("DoRA rescales whole weights")
    if any(adapter.dropout.p for adapter in present):
        raise CannotFuseError("lora_dropout gives each linear an input of its own")
    if len({(adapter.lora_A.shape[0], adapter.scaling, adapter.lora_A.dtype) for adapter in present}) > 1:
        raise CannotFuseError("linears that read one input have adapters of different ranks or scalings")
    if present[0].lora_A.shape[0] > 128:
        raise CannotFuseError("ranks above 128 are too wide to ride along")
    return Pair.of(present, dtype)


def _stacked_bias(linears: Sequence[Linear], device: torch.device) -> Tensor | None:
    biases = [linear.bias for linear in linears if linear.bias is not None]
    if not biases:
        return None
    if len(biases) < len(linears):
        raise CannotFuseError("of the linears that read one input, some have a bias")
    return torch.cat([bias.detach() for bias in biases]).to(device, linears[0].compute_dtype)
