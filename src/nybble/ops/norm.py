"""RMS norm (arXiv 1910.07467) with what stands before it: the residual's sum and an adapter's low-rank product.

Everything is computed in fp32 and rounded once. Weights of norms are frozen: they have no gradient here.
Legend: tokens = batch * seq_len, r = rank of the adapter; `narrow` is x A^T (tokens, r), and B is (hidden, r).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nybble.ops import triton
from nybble.ops.wide import wide_dtype


@torch.library.custom_op("nybble::add_norm", mutates_args=())
def add_norm(
    residual: Tensor | None,
    delta: Tensor,
    narrow: Tensor | None,
    B: Tensor | None,
    scaling: float,
    weight: Tensor,
    eps: float,
    offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute h = residual + delta + scaling * narrow B^T, (tokens, hidden) in delta's dtype, and its norm.

    Returns h, normed = h * (weight + offset) * rstd, and rstd = (mean(h^2) + eps)^-1/2, fp32 (tokens,). Both are of the
    rounded h.
    """
    h = _sum(residual, delta, narrow, B, scaling)
    return h, *_norm(h, weight, eps, offset)


@add_norm.register_fake
def _(_residual: Tensor | None, delta: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return delta.new_empty(delta.shape), *_empty_normed(delta)


@torch.library.custom_op("nybble::norm", mutates_args=())
def norm(h: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """Compute normed and rstd of h (tokens, hidden), as `add_norm` does."""
    return _norm(h, weight, eps, offset)


@norm.register_fake
def _(h: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_normed(h)


@torch.library.custom_op("nybble::norm_backward", mutates_args=())
def norm_backward(
    d_normed: Tensor,
    d_narrow: Tensor | None,
    narrow: Tensor | None,
    A: Tensor | None,
    d_h: Tensor | None,
    h: Tensor,
    rstd: Tensor,
    weight: Tensor,
    offset: float,
) -> Tensor:
    """Gradient of h (tokens, hidden): d_h, and what flows through the norm from d = d_normed + d_narrow A.

    narrow = normed A^T and its gradient (tokens, parts * r) belong to the adapters A (parts * r, hidden) that read
    normed. A norm's gradient needs the sums of d * normed over rows: of its second part, that is of d_narrow * narrow.
    """
    wide = wide_dtype(h)
    factor = weight.to(wide) + offset
    unit = h.to(wide) * rstd[:, None]
    total = (d_normed * factor * unit).sum(1, keepdim=True)
    if d_narrow is not None:
        assert narrow is not None
        total += (d_narrow.to(wide) * narrow).sum(1, keepdim=True)
    d = _sum(None, d_normed.to(wide), d_narrow, None if A is None else A.T, 1.0) * factor
    gradient = (d - unit * (total / h.shape[1])) * rstd[:, None]
    return (gradient if d_h is None else gradient + d_h).to(h.dtype)


@norm_backward.register_fake
def _(d_normed: Tensor, *_: Any) -> Tensor:
    return d_normed.new_empty(d_normed.shape)


@torch.library.custom_op("nybble::norm_again", mutates_args=())
def norm_again(h: Tensor, rstd: Tensor, weight: Tensor, offset: float) -> Tensor:
    """Compute normed of h (tokens, hidden) from the rstd that `norm` or `add_norm` gave, to the same bits."""
    return _scaled(h, rstd, weight, offset)


@norm_again.register_fake
def _(h: Tensor, *_: Any) -> Tensor:
    return h.new_empty(h.shape)


if triton.available():

    @add_norm.register_kernel("cuda")
    def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        from nybble.ops.triton import norm as kernels

        return kernels.add_norm(*arguments)

    @norm.register_kernel("cuda")
    def _(*arguments: Any) -> tuple[Tensor, Tensor]:
        from nybble.ops.triton import norm as kernels

        return kernels.norm(*arguments)

    @norm_backward.register_kernel("cuda")
    def _(*arguments: Any) -> Tensor:
        from nybble.ops.triton import norm as kernels

        return kernels.norm_backward(*arguments)

    @norm_again.register_kernel("cuda")
    def _(*arguments: Any) -> Tensor:
        from nybble.ops.triton import norm as kernels

        return kernels.norm_again(*arguments)


def _sum(residual: Tensor | None, delta: Tensor, narrow: Tensor | None, B: Tensor | None, scaling: float) -> Tensor:
    wide = wide_dtype(delta)
    h = delta.to(wide, copy=True)
    if narrow is not None:
        assert B is not None
        h.addmm_(narrow.to(wide), B.to(wide).T, alpha=scaling)
    if residual is not None:
        h += residual
    return h.to(delta.dtype)


def _norm(h: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(h)
    rstd = (h.to(wide).square().mean(1) + eps).rsqrt()
    return _scaled(h, rstd, weight, offset), rstd


def _scaled(h: Tensor, rstd: Tensor, weight: Tensor, offset: float) -> Tensor:
    return (h * (weight.to(rstd.dtype) + offset) * rstd[:, None]).to(h.dtype)


def _empty_normed(h: Tensor) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(h.shape[0], dtype=wide_dtype(h))
