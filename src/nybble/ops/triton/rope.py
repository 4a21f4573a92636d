"""Kernels that split, normalize and rotate heads, and back; `nybble.ops.rope` is their definition.

A program handles BLOCK_T tokens of BLOCK_HEADS heads. It holds a head as pairs of values that are rotated together:
value i with i + HALF. Values that are not rotated are paired too, and rotated by nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.ops.rope import empty_heads, empty_joint
from nybble.ops.triton.launch import Card, KernelCase, card_of, half_type


@triton.jit
def first_of_program(HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_T: tl.constexpr):
    """The first token and the first head. Neighbours have the same tokens, so that they share pages of memory."""
    groups: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    return (tl.program_id(0) // groups).to(tl.int64) * BLOCK_T, tl.program_id(0) % groups * BLOCK_HEADS


@triton.jit
def rows_at(ptr, token, row, width):
    """Pointers to rows of (tokens, width)."""
    return ptr + token * width + row * width


@triton.jit
def pair_columns(pair, HEAD_DIM: tl.constexpr, HALF: tl.constexpr):
    """The two places in a head of each pair (BLOCK_PAIRS,)."""
    return pair + tl.where(pair < HALF, 0, HALF), pair + tl.where(pair < HALF, HALF, HEAD_DIM // 2)


@triton.jit
def load_angles(cos_rows, sin_rows, pair, inside, HALF: tl.constexpr):
    rotated = inside & (pair < HALF)[None, :]
    cos = tl.load(cos_rows + pair[None, :], mask=rotated, other=1.0).to(tl.float32)
    return cos, tl.load(sin_rows + pair[None, :], mask=rotated, other=0.0).to(tl.float32)


@triton.jit
def load_pairs(rows, column1, column2, inside):
    return tl.load(rows + column1, mask=inside, other=0.0), tl.load(rows + column2, mask=inside, other=0.0)


@triton.jit
def load_adapted(
    qkv_rows,  # pointers to the program's tokens, (BLOCK_T, 1)
    narrow_rows,
    B_ptr,
    scaling,
    column1,
    column2,
    row_inside,
    pair_inside,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Pairs of qkv + scaling * narrow B^T, fp32; zero outside. All loads are under way before one is waited for."""
    x1, x2 = load_pairs(qkv_rows, column1[None, :], column2[None, :], row_inside & pair_inside[None, :])
    for start in tl.static_range(0, RANK, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)[None, :]
        narrow = tl.load(narrow_rows + r, mask=row_inside & (r < RANK), other=0.0)
        B1, B2 = load_pairs(
            B_ptr + r, column1[:, None] * RANK, column2[:, None] * RANK, pair_inside[:, None] & (r < RANK)
        )
        x1 = x1.to(tl.float32) + scaling * tl.dot(narrow, tl.trans(B1), input_precision="ieee")
        x2 = x2.to(tl.float32) + scaling * tl.dot(narrow, tl.trans(B2), input_precision="ieee")
    return x1.to(tl.float32), x2.to(tl.float32)


@triton.jit
def split_rope_kernel(
    tokens,
    q_ptr,  # (tokens, NUM_HEADS, HEAD_DIM)
    k_ptr,  # (tokens, NUM_KV_HEADS, HEAD_DIM)
    v_ptr,
    qkv_ptr,  # (tokens, HEADS * HEAD_DIM)
    narrow_ptr,  # (tokens, PARTS * RANK)
    B_ptr,  # (HEADS * HEAD_DIM, RANK)
    cos_ptr,  # (tokens, 2 * HALF)
    sin_ptr,
    q_norm_ptr,  # (HEAD_DIM,)
    k_norm_ptr,
    scaling,
    eps,
    offset,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    RANK: tl.constexpr,  # 0 where nothing is adapted
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    FIRST_V: tl.constexpr = NUM_HEADS + NUM_KV_HEADS
    HEADS: tl.constexpr = FIRST_V + NUM_KV_HEADS
    token, first_head = first_of_program(HEADS, BLOCK_HEADS, BLOCK_T)
    row, pair = tl.arange(0, BLOCK_T)[:, None], tl.arange(0, BLOCK_PAIRS)
    column1, column2 = pair_columns(pair, HEAD_DIM, HALF)
    row_inside, pair_inside = row < tokens - token, pair < HEAD_DIM // 2
    inside = row_inside & pair_inside[None, :]
    cos_rows, sin_rows = rows_at(cos_ptr, token, row, 2 * HALF), rows_at(sin_ptr, token, row, 2 * HALF)
    cos, sin = load_angles(cos_rows, sin_rows, pair, inside, HALF)

    for head in tl.range(first_head, tl.minimum(first_head + BLOCK_HEADS, HEADS), num_stages=1):
        of_q, of_v = head < NUM_HEADS, head >= FIRST_V
        x = rows_at(qkv_ptr, token, row, HEADS * HEAD_DIM)
        narrow = rows_at(narrow_ptr, token, row, PARTS * RANK)
        if PARTS == 3:
            narrow += tl.where(of_q, 0, tl.where(of_v, 2 * RANK, RANK))
        if NORM:
            weight_ptr = tl.where(of_q, q_norm_ptr, k_norm_ptr)
            weight1, weight2 = load_pairs(weight_ptr, column1, column2, pair_inside)
        column = head * HEAD_DIM
        x1, x2 = load_adapted(
            x, narrow, B_ptr, scaling, column + column1, column + column2, row_inside, pair_inside, RANK, BLOCK_R
        )
        if head < FIRST_V:
            if NORM:
                rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / HEAD_DIM + eps)[:, None]
                x1 *= rstd * (weight1.to(tl.float32) + offset)[None, :]
                x2 *= rstd * (weight2.to(tl.float32) + offset)[None, :]
            x1, x2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin

        out_ptr = tl.where(of_q, q_ptr, tl.where(of_v, v_ptr, k_ptr))
        count = tl.where(of_q, NUM_HEADS, NUM_KV_HEADS)
        first = tl.where(of_q, 0, tl.where(of_v, FIRST_V, NUM_HEADS))
        out = rows_at(out_ptr, token, row, count * HEAD_DIM) + (head - first) * HEAD_DIM
        tl.store(out + column1[None, :], x1.to(q_ptr.dtype.element_ty), mask=inside)
        tl.store(out + column2[None, :], x2.to(q_ptr.dtype.element_ty), mask=inside)


@triton.jit
def split_rope_backward_kernel(
    tokens,
    d_qkv_ptr,  # (tokens, HEADS * HEAD_DIM)
    d_q_ptr,  # (tokens, NUM_HEADS, HEAD_DIM)
    d_k_ptr,  # (tokens, NUM_KV_HEADS, HEAD_DIM)
    d_v_ptr,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    qkv_ptr,  # this, narrow, B and the weights are read with NORM alone
    narrow_ptr,
    B_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    scaling,
    eps,
    offset,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    FIRST_V: tl.constexpr = NUM_HEADS + NUM_KV_HEADS
    HEADS: tl.constexpr = FIRST_V + NUM_KV_HEADS
    token, first_head = first_of_program(HEADS, BLOCK_HEADS, BLOCK_T)
    row, pair = tl.arange(0, BLOCK_T)[:, None], tl.arange(0, BLOCK_PAIRS)
    column1, column2 = pair_columns(pair, HEAD_DIM, HALF)
    row_inside, pair_inside = row < tokens - token, pair < HEAD_DIM // 2
    inside = row_inside & pair_inside[None, :]
    cos_rows, sin_rows = rows_at(cos_ptr, token, row, 2 * HALF), rows_at(sin_ptr, token, row, 2 * HALF)
    cos, sin = load_angles(cos_rows, sin_rows, pair, inside, HALF)

    for head in tl.range(first_head, tl.minimum(first_head + BLOCK_HEADS, HEADS), num_stages=1):
        of_q, of_v = head < NUM_HEADS, head >= FIRST_V
        d_ptr = tl.where(of_q, d_q_ptr, tl.where(of_v, d_v_ptr, d_k_ptr))
        token_stride = tl.where(of_q, q_token_stride, tl.where(of_v, v_token_stride, k_token_stride))
        head_stride = tl.where(of_q, q_head_stride, tl.where(of_v, v_head_stride, k_head_stride))
        first = tl.where(of_q, 0, tl.where(of_v, FIRST_V, NUM_HEADS))
        d = rows_at(d_ptr, token, row, token_stride) + (head - first).to(tl.int64) * head_stride
        d1, d2 = load_pairs(d, column1[None, :], column2[None, :], inside)
        column = head * HEAD_DIM
        if head < FIRST_V:
            if NORM:
                x = rows_at(qkv_ptr, token, row, HEADS * HEAD_DIM)
                narrow = rows_at(narrow_ptr, token, row, PARTS * RANK)
                if PARTS == 3:
                    narrow += tl.where(of_q, 0, RANK)
                weight_ptr = tl.where(of_q, q_norm_ptr, k_norm_ptr)
                weight1, weight2 = load_pairs(weight_ptr, column1, column2, pair_inside)
                x1, x2 = load_adapted(
                    x,
                    narrow,
                    B_ptr,
                    scaling,
                    column + column1,
                    column + column2,
                    row_inside,
                    pair_inside,
                    RANK,
                    BLOCK_R,
                )
            d1, d2 = d1.to(tl.float32), d2.to(tl.float32)
            d1, d2 = d1 * cos + d2 * sin, d2 * cos - d1 * sin
            if NORM:
                rstd = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / HEAD_DIM + eps)[:, None]
                d1 *= (weight1.to(tl.float32) + offset)[None, :]
                d2 *= (weight2.to(tl.float32) + offset)[None, :]
                along = tl.sum(d1 * x1 + d2 * x2, axis=1)[:, None] * (rstd * rstd / HEAD_DIM)
                d1, d2 = rstd * (d1 - x1 * along), rstd * (d2 - x2 * along)
            d1, d2 = d1.to(d_qkv_ptr.dtype.element_ty), d2.to(d_qkv_ptr.dtype.element_ty)

        out = rows_at(d_qkv_ptr, token, row, HEADS * HEAD_DIM) + column
        tl.store(out + column1[None, :], d1, mask=inside)
        tl.store(out + column2[None, :], d2, mask=inside)


@dataclass(frozen=True)
class Heads:
    """What a kernel is compiled for."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    norm: bool
    rank: int
    parts: int
    element_size: int


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched over all tokens and heads."""

    groups: int  # of heads
    num_warps: int
    constants: dict[str, Any]

    def __call__(self, kernel: Any, tokens: int, *arguments: Any) -> None:
        programs = -(-tokens // self.constants["BLOCK_T"]) * self.groups
        if programs:
            with torch.cuda.device_of(arguments[0]):  # type: ignore[no-untyped-call]
                kernel[(programs,)](tokens, *arguments, **self.constants, num_warps=self.num_warps)


@functools.lru_cache(maxsize=1024)  # a model has one or two kinds of heads, and asks at every layer
def plan(heads: Heads, block_t: int) -> Launch:
    """Launch parameters; `block_t` tokens are a program's."""
    block_heads = 4  # cos and sin, as large as one head of bf16, are read once for so many
    block_pairs = max(32, triton.next_power_of_2(heads.head_dim // 2))
    constants = {
        "NUM_HEADS": heads.num_heads,
        "NUM_KV_HEADS": heads.num_kv_heads,
        "HEAD_DIM": heads.head_dim,
        "HALF": heads.rotary_dim // 2,
        "NORM": heads.norm,
        "RANK": heads.rank,
        "PARTS": heads.parts,
        "BLOCK_T": block_t,
        "BLOCK_HEADS": block_heads,
        "BLOCK_PAIRS": block_pairs,
        # 128 bytes of a row of B at a time, so that any rank fits in the shared memory of any card.
        "BLOCK_R": min(128 // heads.element_size, max(16, triton.next_power_of_2(heads.rank))),
    }
    return Launch(-(-(heads.num_heads + 2 * heads.num_kv_heads) // block_heads), block_pairs // 8, constants)


def forward_plan(heads: Heads, card: Card) -> Launch:
    # 64 tokens are the rows of Hopper's matrix instruction, which takes operands from shared memory. Elsewhere operands
    # are held in registers: 32 tokens keep several programs on a multiprocessor.
    return plan(heads, 64 if heads.rank and card.capability[0] == 9 else 32)


def backward_plan(heads: Heads) -> Launch:
    return plan(heads, 32)  # gradients are held beside the heads: with 64, one program fills a multiprocessor


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
    """`split_rope` on the card."""
    q, k, v = empty_heads(qkv, num_heads, num_kv_heads)
    launch = forward_plan(_heads(q, k, cos, q_norm, B, parts), card_of(qkv.device))
    inputs = qkv, *_or(qkv, narrow, B), cos, sin, *_or(qkv, q_norm, k_norm)
    assert all(tensor.is_contiguous() for tensor in inputs)
    launch(split_rope_kernel, qkv.shape[0], q, k, v, *inputs, scaling, eps, offset)
    return q, k, v


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
    """`split_rope_backward` on the card."""
    d_qkv = empty_joint(d_q, d_k, d_v)
    launch = backward_plan(_heads(d_q, d_k, cos, q_norm, B, parts))
    strides = [stride for tensor in (d_q, d_k, d_v) for stride in tensor.stride()[:2]]
    inputs = *_or(d_qkv, qkv, narrow, B), cos, sin, *_or(d_qkv, q_norm, k_norm)
    assert all(tensor.is_contiguous() for tensor in inputs)
    assert d_q.stride(2) == d_k.stride(2) == d_v.stride(2) == 1
    launch(split_rope_backward_kernel, d_q.shape[0], d_qkv, d_q, d_k, d_v, *strides, *inputs, scaling, eps, offset)
    return d_qkv


def _heads(q: Tensor, k: Tensor, cos: Tensor, q_norm: Tensor | None, B: Tensor | None, parts: int) -> Heads:
    rank = 0 if B is None else B.shape[1]
    return Heads(q.shape[1], k.shape[1], q.shape[2], cos.shape[1], q_norm is not None, rank, parts, q.element_size())


def _or(other: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Each tensor, or `other` where there is none and the kernel reads none."""
    return [other if tensor is None else tensor for tensor in tensors]


def compile_cases(card: Card) -> list[KernelCase]:
    """Both kernels as Llama 3, Qwen3, Phi-4 and Gemma 3 launch them on `card`, the last in fp32 too."""
    half = half_type(card)
    return [
        *_cases(card, "plain", half, Heads(32, 8, 128, 128, norm=False, rank=0, parts=1, element_size=2)),
        *_cases(card, "norms", half, Heads(32, 8, 128, 128, norm=True, rank=16, parts=3, element_size=2)),
        *_cases(card, "partial", half, Heads(24, 8, 128, 96, norm=False, rank=64, parts=1, element_size=2)),
        *_cases(card, "large", half, Heads(8, 4, 256, 256, norm=True, rank=128, parts=3, element_size=2)),
        *_cases(card, "fp32", "fp32", Heads(8, 4, 256, 256, norm=True, rank=128, parts=3, element_size=4)),
    ]


def _cases(card: Card, name: str, element_type: str, heads: Heads) -> Iterator[KernelCase]:
    forward, backward = forward_plan(heads, card), backward_plan(heads)
    for op, kernel, launch in (
        ("rope", split_rope_kernel, forward),
        ("rope_backward", split_rope_backward_kernel, backward),
    ):
        types = {n: f"*{element_type}" if n.endswith("_ptr") else "i32" for n in kernel.arg_names}
        types |= {"scaling": "fp32", "eps": "fp32", "offset": "fp32"}
        variables = {n: kind for n, kind in types.items() if n not in launch.constants}
        yield KernelCase(f"{op} {name}", kernel, variables, launch.constants, launch.num_warps)
