"""The gated linear unit of an MLP, act(gate) * up, with the low-rank product of gate and up added on the way.

Legend: tokens = batch * seq_len; r = rank; parts = 2 where gate and up have a pair each, 1 where one pair covers both.
gate_up (tokens, 2 * intermediate), gate first, is what the frozen weights give; narrow = x A^T (tokens, parts * r);
B (2 * intermediate, r). narrow and B are None where nothing is adapted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from nybble.ops import triton
from nybble.ops.wide import wide_dtype

ACTIVATIONS = ("silu", "gelu_tanh")


@torch.library.custom_op("nybble::glu", mutates_args=())
def glu(
    gate_up: Tensor, narrow: Tensor | None, B: Tensor | None, scaling: float, parts: int, activation: str
) -> Tensor:
    """act(gate) * up (tokens, intermediate) of gate_up + scaling * narrow B^T."""
    gate, up = _projections(gate_up, narrow, B, scaling, parts)
    return (_activate(gate, activation) * up).to(gate_up.dtype)


@glu.register_fake
def _(gate_up: Tensor, *_: Any) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@torch.library.custom_op("nybble::glu_backward_", mutates_args=("d_act", "gate_up"))
def glu_backward_(
    d_act: Tensor,
    d_narrow: Tensor | None,
    A: Tensor | None,
    gate_up: Tensor,
    narrow: Tensor | None,
    B: Tensor | None,
    scaling: float,
    parts: int,
    activation: str,
) -> None:
    """The gradient of `glu` along d_act + d_narrow A, in place: these are the largest tensors of a block.

    d_narrow (tokens, r) and A (r, intermediate) are those of the linear that follows. gate_up becomes its gradient, and
    d_act becomes act(gate) * up again, which the gradient of A takes, so that the forward pass need not keep it.
    """
    gate, up = _projections(gate_up, narrow, B, scaling, parts)
    d = d_act.to(gate.dtype)
    if d_narrow is not None:
        assert A is not None
        d = d + d_narrow.to(d.dtype) @ A.to(d.dtype)
    act = _activate(gate, activation)
    d_gate_up = torch.cat([d * up * _derivative(gate, activation), d * act], 1)
    d_act.copy_(act * up)
    gate_up.copy_(d_gate_up)  # last: gate and up are views of it where nothing was added or converted


@glu_backward_.register_fake
def _(*_: Any) -> None:
    pass


if triton.available():

    @glu.register_kernel("cuda")
    def _(*arguments: Any) -> Tensor:
        from nybble.ops.triton import glu as kernels

        return kernels.glu(*arguments)

    @glu_backward_.register_kernel("cuda")
    def _(*arguments: Any) -> None:
        from nybble.ops.triton import glu as kernels

        kernels.glu_backward_(*arguments)


def _projections(
    gate_up: Tensor, narrow: Tensor | None, B: Tensor | None, scaling: float, parts: int
) -> tuple[Tensor, Tensor]:
    """gate and up, each (tokens, intermediate), in fp32 (fp64 for fp64)."""
    wide = wide_dtype(gate_up)
    gate, up = gate_up.to(wide).chunk(2, 1)
    if narrow is None:
        return gate, up
    assert B is not None
    of_gate, of_up = narrow.to(wide).chunk(2, 1) if parts == 2 else 2 * (narrow.to(wide),)
    B_gate, B_up = B.to(wide).chunk(2)
    return gate + scaling * of_gate @ B_gate.t(), up + scaling * of_up @ B_up.t()


def _activate(gate: Tensor, activation: str) -> Tensor:
    return silu(gate) if activation == "silu" else gelu(gate, approximate="tanh")


def _derivative(gate: Tensor, activation: str) -> Tensor:
    """Both activations are x * sigmoid(z(x)), with z = x for silu, and 2 sqrt(2 / pi) (x + 0.044715 x^3) for gelu."""
    z, slope = gate, torch.ones_like(gate)
    if activation == "gelu_tanh":
        z = 1.5957691216057308 * (gate + 0.044715 * gate**3)
        slope = 1.5957691216057308 * (1 + 3 * 0.044715 * gate**2)
    sigmoid = torch.sigmoid(z)
    return sigmoid + gate * sigmoid * (1 - sigmoid) * slope
