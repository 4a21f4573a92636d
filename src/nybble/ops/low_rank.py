"""Gradients of low-rank pairs: y = x W^T + scaling * (x A^T) B^T, for one or several linears that read the same x.

Legend: tokens = batch * seq_len; in, out; r = rank; parts = pairs stacked along out, each with its r columns of narrow.
narrow = x A^T (tokens, parts * r); A (parts * r, in); B (out, r).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.ops import triton


@torch.library.custom_op("nybble::low_rank_backward", mutates_args=())
def low_rank_backward(
    d_output: Tensor, narrow: Tensor, B: Tensor, scaling: float, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    """What flows back from y (tokens, out) into narrow and B; `sizes` are the rows of B that belong to each part.

    Returns d_narrow (tokens, parts * r) in the dtype of y, with the scaling in it, and d_B (out, r), fp32.
    """
    return _by_two_products(d_output, narrow, B, scaling, sizes)


@low_rank_backward.register_fake
def _(
    d_output: Tensor,
    narrow: Tensor,
    B: Tensor,
    scaling: float,  # noqa: ARG001
    sizes: list[int],  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(narrow), B.new_empty(B.shape, dtype=_wide(d_output))


@torch.library.custom_op("nybble::a_gradient", mutates_args=())
def a_gradient(d_narrow: Tensor, x: Tensor) -> Tensor:
    """The gradient of A, fp32 (parts * r, in), from d_narrow (tokens, parts * r) and x (tokens, in)."""
    return _mm(d_narrow.t(), x)


@a_gradient.register_fake
def _(d_narrow: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(d_narrow.shape[1], x.shape[1], dtype=_wide(x))


if triton.available():

    @low_rank_backward.register_kernel("cuda")
    def _(d_output: Tensor, narrow: Tensor, B: Tensor, scaling: float, sizes: list[int]) -> tuple[Tensor, Tensor]:
        from nybble.ops.triton import low_rank as kernels

        by_kernel = kernels.handles(d_output, B.shape[1])
        way = kernels.low_rank_backward if by_kernel else _by_two_products
        return way(d_output, narrow, B, scaling, sizes)


def _by_two_products(
    d_output: Tensor, narrow: Tensor, B: Tensor, scaling: float, sizes: list[int]
) -> tuple[Tensor, Tensor]:
    narrow_parts = torch.split(narrow, B.shape[1], 1)
    parts = zip(torch.split(d_output, sizes, 1), narrow_parts, torch.split(B, sizes), strict=True)
    products = [(_mm(d_part, B_part), _mm(d_part.t(), narrow_part)) for d_part, narrow_part, B_part in parts]
    d_narrow, d_B = torch.cat([d for d, _ in products], 1), torch.cat([d for _, d in products])
    return d_narrow.mul_(scaling).to(d_output.dtype), d_B.mul_(scaling)


@torch.library.custom_op("nybble::a_gradient_", mutates_args=("out",))
def a_gradient_(out: Tensor, d_narrow: Tensor, x: Tensor) -> None:
    """Add `a_gradient` to out, fp32 (parts * r, in)."""
    if x.is_cuda and x.element_size() == 2:
        torch.addmm(out, d_narrow.t(), x, out_dtype=torch.float32, out=out)
    else:
        out += _mm(d_narrow.t(), x)


@a_gradient_.register_fake
def _(out: Tensor, d_narrow: Tensor, x: Tensor) -> None:
    pass


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and left in fp32 (fp64 for fp64)."""
    if a.is_cuda and a.element_size() == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.to(_wide(a)) @ b.to(_wide(b))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
