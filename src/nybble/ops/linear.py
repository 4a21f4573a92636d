"""A linear layer over a frozen weight that is held in another form than it is multiplied in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Materialize = Callable[..., Tensor]


def frozen_linear(x: Tensor, bias: Tensor | None, materialize: Materialize, *stored: Tensor) -> Tensor:
    """`x @ materialize(*stored).T + bias`, where only the stored form lives from forward to backward.

    x (..., in) and bias (out,) in the compute dtype; `materialize` returns (out, in) in the same dtype and is called
    once in each pass. Gradients flow to x and bias, never to what is stored.
    """
    output: Tensor = _FrozenLinear.apply(x, bias, materialize, *stored)  # type: ignore[no-untyped-call]
    return output


class _FrozenLinear(torch.autograd.Function):
    # What is saved are the parameters themselves: FSDP2 frees and refills their storage between the passes.
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, materialize: Materialize, *stored: Tensor) -> Tensor:
        ctx.materialize = materialize
        ctx.save_for_backward(*stored)
        return torch.nn.functional.linear(x, materialize(*stored), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        stored = ctx.saved_tensors  # read once: under activation checkpointing a second read is an error
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_output @ ctx.materialize(*stored)
        if ctx.needs_input_grad[1]:
            grad_bias = grad_output.flatten(0, -2).sum(0)
        return grad_x, grad_bias, None, *(None for _ in stored)
