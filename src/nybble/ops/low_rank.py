"""Gradients of low-rank pairs: y = x W^T + scaling * (x A^T) B^T, for one or several linears that read the same x.

Legend: tokens = batch * seq_len; in, out; r = rank; parts = pairs stacked along out, each with its r columns of narrow.
narrow = x A^T (tokens, parts * r); A (parts * r, in); B (out, r).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nybble.ops import triton
from nybble.ops.wide import add_product_, wide_dtype


@torch.library.custom_op("nybble::low_rank_backward_", mutates_args=("d_B",))
def low_rank_backward_(
    d_B: Tensor, d_output: Tensor, narrow: Tensor, B: Tensor, scaling: float, sizes: list[int]
) -> Tensor:
    """What flows back from y (tokens, out) into narrow and B; `sizes` are the rows of B that belong to each part.

    Returns d_narrow (tokens, parts * r) in the dtype of y, with the scaling in it. The gradient of B is added to d_B,
    fp32 (out, r).
    """
    return _by_two_products(d_B, d_output, narrow, B, scaling, sizes)


@low_rank_backward_.register_fake
def _(_d_B: Tensor, _d_output: Tensor, narrow: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(narrow)


@torch.library.custom_op("nybble::a_gradient_", mutates_args=("d_A",))
def a_gradient_(d_A: Tensor, d_narrow: Tensor, x: Tensor) -> None:
    """Add the gradient of A to d_A, fp32 (parts * r, in), from d_narrow (tokens, parts * r) and x (tokens, in)."""
    add_product_(d_A, d_narrow.t(), x)


@a_gradient_.register_fake
def _(d_A: Tensor, d_narrow: Tensor, x: Tensor) -> None:
    pass


if triton.available():

    @low_rank_backward_.register_kernel("cuda")
    def _(d_B: Tensor, d_output: Tensor, narrow: Tensor, B: Tensor, scaling: float, sizes: list[int]) -> Tensor:
        from nybble.ops.triton import low_rank as kernels

        by_kernel = kernels.handles(d_output, B.shape[1])
        way = kernels.low_rank_backward_ if by_kernel else _by_two_products
        return way(d_B, d_output, narrow, B, scaling, sizes)


def _by_two_products(
    d_B: Tensor, d_output: Tensor, narrow: Tensor, B: Tensor, scaling: float, sizes: list[int]
) -> Tensor:
    d_narrow = torch.empty_like(narrow)
    columns = [torch.split(matrix, B.shape[1], 1) for matrix in (d_narrow, narrow)]
    rows = [torch.split(matrix, sizes) for matrix in (d_B, B)]
    for d_part, d_narrow_part, narrow_part, d_B_part, B_part in zip(
        torch.split(d_output, sizes, 1), *columns, *rows, strict=True
    ):
        d_narrow_part.copy_(_mm(d_part, B_part).mul_(scaling))
        add_product_(d_B_part, d_part.t(), narrow_part, scaling)
    return d_narrow


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and left in fp32 (fp64 for fp64)."""
    if a.is_cuda and a.element_size() == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.to(wide_dtype(a)) @ b.to(wide_dtype(b))
