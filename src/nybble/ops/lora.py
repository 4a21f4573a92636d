"""A frozen linear layer and the low-rank pair beside it, as one region: y = W x + bias + scaling * B A x.

Legend: tokens = all leading dimensions of x; in, out; r = rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from nybble.ops.linear import Materialize


def lora_linear(
    x: Tensor, pair: tuple[Tensor, Tensor, float], bias: Tensor | None, materialize: Materialize, *stored: Tensor
) -> Tensor:
    """The adapted output (..., out) for x (..., in), in the dtype of x, which is the compute dtype.

    pair: A (r, in), B (out, r) and the scaling; A and B may be held in another dtype, their gradients come in it.
    bias, materialize, stored: as in `frozen_linear`. Between the passes x, A x and what is stored are kept.
    """
    A, B, scaling = pair
    return _lora_linear(x, A, B, scaling, bias, materialize, *stored)


class _LoRALinear(torch.autograd.Function):
    # The low-rank product is added by the GEMM that makes it, in both passes. Left to autograd, it is a pass of its own
    # over (tokens, out) and another over (tokens, in): the first alone took 0.77 ms a layer of 8B at 8k tokens on an
    # H100. And the host, which is what small batches wait for, makes one node of the graph instead of nine.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        scaling: float,
        bias: Tensor | None,
        materialize: Materialize,
        *stored: Tensor,
    ) -> Tensor:
        output = linear(x, materialize(*stored), bias)
        narrow = linear(x, A.to(x.dtype)).flatten(0, -2)
        output.view(-1, output.shape[-1]).addmm_(narrow, B.to(x.dtype).t(), alpha=scaling)
        ctx.scaling, ctx.materialize = scaling, materialize
        ctx.save_for_backward(x, narrow, A, B, *stored)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, narrow, A, B, *stored = ctx.saved_tensors
        grad = grad_output.flatten(0, -2)
        grad_narrow = grad @ B.to(x.dtype) * ctx.scaling
        grad_A = (grad_narrow.t() @ x.flatten(0, -2)).to(A.dtype) if ctx.needs_input_grad[1] else None
        grad_B = (grad.t() @ narrow).to(B.dtype).mul_(ctx.scaling) if ctx.needs_input_grad[2] else None
        grad_bias = grad.sum(0) if ctx.needs_input_grad[4] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ ctx.materialize(*stored)
            grad_x = grad_x.addmm_(grad_narrow, A.to(x.dtype)).view(x.shape)
        return grad_x, grad_A, grad_B, None, grad_bias, None, *(None for _ in stored)


# The class attribute has no type of its own in PyTorch.
_lora_linear: Callable[..., Tensor] = _LoRALinear.apply
