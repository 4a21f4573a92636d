"""From the joint output of the query, key and value projections to rotated heads, and back.

The low-rank product of an adapter is added and the heads are normalized (Qwen3, Gemma 3) on the way: one pass over
memory. Legend: tokens = batch * seq_len; heads = num_heads, then twice num_kv_heads; r = rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nybble.ops import triton
from nybble.ops.wide import wide_dtype


@torch.library.custom_op("nybble::split_rope", mutates_args=())
def split_rope(
    qkv: Tensor,
    narrow: Tensor | None,
    B: Tensor | None,
    scaling: float,
    parts: int,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split qkv (tokens, heads * head_dim) into q (tokens, num_heads, head_dim), k and v (tokens, num_kv_heads, ...).

    First, scaling * narrow B^T is added: narrow (tokens, parts * r), B (heads * head_dim, r); parts is 3 where q, k and
    v have a pair each, 1 where they share one. Then, where q_norm and k_norm (head_dim,) are given, each head of q and
    k is divided by its root mean square and multiplied by weight + offset. Last, the first rotary_dim values of each
    head of q and k are rotated by cos and sin (tokens, rotary_dim), whose halves are equal, as Transformers makes them:
    the second is not read. All in fp32, rounded once.
    """
    q, k, v = _adapted_heads(qkv, narrow, B, scaling, parts, num_heads, num_kv_heads)
    if q_norm is not None and k_norm is not None:
        q = q * _rstd(q, eps) * (q_norm.to(q.dtype) + offset)
        k = k * _rstd(k, eps) * (k_norm.to(k.dtype) + offset)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    return q.to(qkv.dtype), k.to(qkv.dtype), v.to(qkv.dtype, copy=True, memory_format=torch.contiguous_format)


@split_rope.register_fake
def _(
    qkv: Tensor,
    narrow: Tensor | None,  # noqa: ARG001
    B: Tensor | None,  # noqa: ARG001
    scaling: float,  # noqa: ARG001
    parts: int,  # noqa: ARG001
    cos: Tensor,  # noqa: ARG001
    sin: Tensor,  # noqa: ARG001
    num_heads: int,
    num_kv_heads: int,
    q_norm: Tensor | None,  # noqa: ARG001
    k_norm: Tensor | None,  # noqa: ARG001
    eps: float,  # noqa: ARG001
    offset: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_heads(qkv, num_heads, num_kv_heads)


@torch.library.custom_op("nybble::split_rope_backward", mutates_args=())
def split_rope_backward(
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    qkv: Tensor | None = None,
    narrow: Tensor | None = None,
    B: Tensor | None = None,
    scaling: float = 1.0,
    parts: int = 1,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
) -> Tensor:
    """The gradient (tokens, heads * head_dim) of `split_rope` with respect to qkv + scaling * narrow B^T.

    What follows cos and sin is asked for with q_norm and k_norm alone: the heads are normalized again, from the values
    that `split_rope` read. To recover them from q would divide by weight + offset, which may be zero.
    d_q, d_k and d_v may have any strides, but for the last dimension.
    """
    wide = wide_dtype(d_q)
    q, k = (_rotate(gradient.to(wide), cos, -sin) for gradient in (d_q, d_k))
    if q_norm is not None and k_norm is not None:
        assert qkv is not None
        q_heads, k_heads, _ = _adapted_heads(qkv, narrow, B, scaling, parts, d_q.shape[1], d_k.shape[1])
        q = _norm_backward(q, q_heads, q_norm.to(wide) + offset, eps)
        k = _norm_backward(k, k_heads, k_norm.to(wide) + offset, eps)
    return torch.cat([q, k, d_v.to(wide)], dim=1).flatten(1).to(d_q.dtype)


@split_rope_backward.register_fake
def _(d_q: Tensor, d_k: Tensor, d_v: Tensor, *_: Tensor | float | None) -> Tensor:
    return empty_joint(d_q, d_k, d_v)


if triton.available():

    @split_rope.register_kernel("cuda")
    def _(qkv: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        from nybble.ops.triton import rope as kernels

        return kernels.split_rope(qkv, *arguments)

    @split_rope_backward.register_kernel("cuda")
    def _(d_q: Tensor, *arguments: Any) -> Tensor:
        from nybble.ops.triton import rope as kernels

        return kernels.split_rope_backward(d_q, *arguments)


def empty_heads(qkv: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `split_rope` returns, not yet written."""
    tokens, width = qkv.shape
    head_dim = width // (num_heads + 2 * num_kv_heads)
    q, k, v = (qkv.new_empty(tokens, count, head_dim) for count in (num_heads, num_kv_heads, num_kv_heads))
    return q, k, v


def empty_joint(d_q: Tensor, d_k: Tensor, d_v: Tensor) -> Tensor:
    """What `split_rope_backward` returns, not yet written."""
    return d_q.new_empty(d_q.shape[0], (d_q.shape[1] + d_k.shape[1] + d_v.shape[1]) * d_q.shape[2])


def _adapted_heads(
    qkv: Tensor, narrow: Tensor | None, B: Tensor | None, scaling: float, parts: int, num_heads: int, num_kv_heads: int
) -> list[Tensor]:
    """The heads of q, k and v in qkv + scaling * narrow B^T, in fp32 at least."""
    tokens, width = qkv.shape
    counts = [num_heads, num_kv_heads, num_kv_heads]
    head_dim = width // sum(counts)
    x = qkv.to(wide_dtype(qkv))
    if narrow is not None and B is not None:
        sizes = [count * head_dim for count in counts] if parts == 3 else [width]
        pairs = zip(narrow.to(x.dtype).chunk(parts, dim=1), torch.split(B.to(x.dtype), sizes), strict=True)
        x = x + scaling * torch.cat([narrow_part @ B_part.t() for narrow_part, B_part in pairs], dim=1)
    return list(torch.split(x.view(tokens, sum(counts), head_dim), counts, dim=1))


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (tokens, any, head_dim): the first half of the rotary values with the second."""
    half = cos.shape[1] // 2
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    first, second, rest = heads.tensor_split([half, 2 * half], dim=2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=2)


def _rstd(heads: Tensor, eps: float) -> Tensor:
    return (heads.square().mean(dim=-1, keepdim=True) + eps).rsqrt()


def _norm_backward(gradient: Tensor, heads: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The gradient of heads * rstd * weight with respect to heads."""
    rstd = _rstd(heads, eps)
    normed, gradient = heads * rstd, gradient * weight
    return rstd * (gradient - normed * (gradient * normed).mean(dim=-1, keepdim=True))
