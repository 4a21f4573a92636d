"""Kernels of RMS norm; `nybble.ops.norm` and `nybble.ops.norm_fp8` are their definition.

A program takes BLOCK_T rows in chunks of BLOCK_C columns. Without a low-rank product a chunk is a whole row and stays
in registers. Otherwise the rows are gone through twice, since a norm needs all of a row before its first value can be
scaled; the second time backwards, so that what was touched last is found in the L2 cache: 16 rows of two tensors of
width 4096 on each multiprocessor of an H100 are 35 MB, of 50. Only one of the passes computes the product.

Each program reads all of A or B from the L2 cache, too: of rank 48 and width 4096 as much as three tensors have in 16
rows. Ranks are summed in tiles of up to 64, since each tile costs a way through shared memory, and chunks are copied
there ahead of their use.

A row's scale in e4m3 follows from the largest of what is stored, which is known before any of it is made: rounding
keeps order, so of h * factor * rstd the largest in a row is that of h * factor, times rstd, rounded.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.ops.fp8 import E4M3
from nybble.ops.triton.fp8 import LIMITS, magnitude, scale_of
from nybble.ops.triton.launch import Card, KernelCase, card_of, half_type


@triton.jit
def tile_places(row, column, rows, columns):
    """Where the values at `row` and `column` of a contiguous matrix (rows, columns) are, and which of them exist."""
    return row[:, None] * columns + column[None, :], (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
def load_tile(ptr, row, column, rows, columns):
    place, inside = tile_places(row, column, rows, columns)
    return tl.load(ptr + place, mask=inside, other=0.0)


@triton.jit
def store_tile(ptr, tile, row, column, rows, columns):
    place, inside = tile_places(row, column, rows, columns)
    tl.store(ptr + place, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_factor(weight_ptr, offset, column, HIDDEN: tl.constexpr):
    return (tl.load(weight_ptr + column, mask=column < HIDDEN, other=0.0).to(tl.float32) + offset)[None, :]


@triton.jit
def load_narrow(ptr, row, tokens, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """Rows of a narrow matrix (tokens, R) in tiles of BLOCK_R columns, all loaded before the loops that use them."""
    tiles = ()
    for first in tl.static_range(0, R, BLOCK_R):
        tiles += (load_tile(ptr, row, first + tl.arange(0, BLOCK_R), tokens, R),)  # type: ignore[assignment]
    return tiles


@triton.jit
def store_fp8(values_ptr, rows, scale, row, column, tokens, columns):
    place, inside = tile_places(row, column, tokens, columns)
    # A thread stores as many as it loads in 16 bytes. If it stored 16 bytes, Triton would have threads load twice as
    # many too, and they would sum the norm in another order than without e4m3.
    ptr = tl.max_contiguous(values_ptr + place, (1, 128 // rows.dtype.primitive_bitwidth))
    tl.store(ptr, (rows.to(tl.float32) * tl.div_rn(1.0, scale)[:, None]).to(tl.float8e4nv), mask=inside)


@triton.jit
def add_norm_kernel(
    h_ptr,  # (tokens, HIDDEN), or None: not stored
    normed_ptr,  # (tokens, HIDDEN)
    rstd_ptr,  # fp32 (tokens,)
    values_ptr,  # e4m3 (tokens, HIDDEN), or None with scale_ptr: the norm as it is, alone
    scale_ptr,  # fp32 (tokens,)
    residual_ptr,  # (tokens, HIDDEN), or None
    delta_ptr,  # (tokens, HIDDEN)
    narrow_ptr,  # (tokens, R)
    B_ptr,  # (HIDDEN, R)
    weight_ptr,  # (HIDDEN,)
    scaling,
    eps,
    offset,
    tokens,
    HIDDEN: tl.constexpr,
    R: tl.constexpr,  # 0 where nothing is adapted
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    MAX: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    squares = h
    peaks = h
    narrow = load_narrow(narrow_ptr, row, tokens, R, BLOCK_R)
    for start in tl.range(0, HIDDEN, BLOCK_C, num_stages=NUM_STAGES):
        column = start + tl.arange(0, BLOCK_C)
        h = load_tile(delta_ptr, row, column, tokens, HIDDEN).to(tl.float32)
        if residual_ptr is not None:
            h += load_tile(residual_ptr, row, column, tokens, HIDDEN).to(tl.float32)
        if R:
            product = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
            for i in tl.static_range(len(narrow)):
                B = load_tile(B_ptr, column, i * BLOCK_R + tl.arange(0, BLOCK_R), HIDDEN, R)
                product = tl.dot(narrow[i], tl.trans(B), product, input_precision="ieee")
            h += scaling * product
        h = h.to(delta_ptr.dtype.element_ty)
        if h_ptr is not None:
            store_tile(h_ptr, h, row, column, tokens, HIDDEN)
        h = h.to(tl.float32)
        squares += h * h
        if values_ptr is not None:
            peaks = tl.maximum(peaks, magnitude(h * load_factor(weight_ptr, offset, column, HIDDEN)))

    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, axis=1) * (1.0 / HIDDEN) + eps))
    tl.store(rstd_ptr + row, rstd, mask=row < tokens)
    if values_ptr is not None:
        peak = (tl.max(peaks, axis=1) * rstd).to(normed_ptr.dtype.element_ty).to(tl.float32)
        scale = scale_of(peak, MAX, SMALLEST)
        tl.store(scale_ptr + row, scale, mask=row < tokens)
    tl.debug_barrier()  # h is read again, and by other threads than wrote it
    for back in tl.range(0, HIDDEN, BLOCK_C, num_stages=NUM_STAGES):
        column = (HIDDEN - 1) // BLOCK_C * BLOCK_C - back + tl.arange(0, BLOCK_C)
        if BLOCK_C < HIDDEN:
            h = load_tile(h_ptr, row, column, tokens, HIDDEN).to(tl.float32)
        normed = h * load_factor(weight_ptr, offset, column, HIDDEN) * rstd[:, None]
        normed = normed.to(normed_ptr.dtype.element_ty)
        store_tile(normed_ptr, normed, row, column, tokens, HIDDEN)
        if values_ptr is not None:
            store_fp8(values_ptr, normed, scale, row, column, tokens, HIDDEN)


@triton.jit
def norm_again_kernel(
    normed_ptr,  # (tokens, HIDDEN)
    values_ptr,  # e4m3 (tokens, HIDDEN), or None with scale_ptr
    scale_ptr,  # fp32 (tokens,)
    h_ptr,  # (tokens, HIDDEN)
    rstd_ptr,  # fp32 (tokens,)
    weight_ptr,  # (HIDDEN,)
    offset,
    tokens,
    HIDDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MAX: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_C)
    rstd = tl.load(rstd_ptr + row, mask=row < tokens, other=0.0)
    h = load_tile(h_ptr, row, column, tokens, HIDDEN).to(tl.float32)
    normed = h * load_factor(weight_ptr, offset, column, HIDDEN) * rstd[:, None]
    normed = normed.to(normed_ptr.dtype.element_ty)
    store_tile(normed_ptr, normed, row, column, tokens, HIDDEN)
    if values_ptr is not None:
        scale = scale_of(tl.max(magnitude(normed.to(tl.float32)), axis=1), MAX, SMALLEST)
        tl.store(scale_ptr + row, scale, mask=row < tokens)
        store_fp8(values_ptr, normed, scale, row, column, tokens, HIDDEN)


@triton.jit
def norm_backward_kernel(
    out_ptr,  # (tokens, HIDDEN)
    d_normed_ptr,  # (tokens, HIDDEN)
    d_narrow_ptr,  # (tokens, R)
    narrow_ptr,  # (tokens, R)
    A_ptr,  # (R, HIDDEN)
    d_h_ptr,  # (tokens, HIDDEN), or None
    h_ptr,  # (tokens, HIDDEN)
    rstd_ptr,  # fp32 (tokens,)
    weight_ptr,  # (HIDDEN,)
    offset,
    tokens,
    HIDDEN: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    rstd = tl.load(rstd_ptr + row, mask=row < tokens, other=0.0)[:, None]
    d = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    h = d
    products = d
    narrow = load_narrow(narrow_ptr, row, tokens, R, BLOCK_R)
    d_narrow = load_narrow(d_narrow_ptr, row, tokens, R, BLOCK_R)
    for start in tl.range(0, HIDDEN, BLOCK_C, num_stages=NUM_STAGES):
        column = start + tl.arange(0, BLOCK_C)
        h = load_tile(h_ptr, row, column, tokens, HIDDEN).to(tl.float32)
        d = load_tile(d_normed_ptr, row, column, tokens, HIDDEN).to(tl.float32)
        products += d * load_factor(weight_ptr, offset, column, HIDDEN) * h

    total = tl.sum(products, axis=1)[:, None] * rstd
    for i in tl.static_range(len(narrow)):
        total += tl.sum(d_narrow[i].to(tl.float32) * narrow[i].to(tl.float32), axis=1)[:, None]
    share = total * (1.0 / HIDDEN) * rstd
    for back in tl.range(0, HIDDEN, BLOCK_C, num_stages=NUM_STAGES):
        column = (HIDDEN - 1) // BLOCK_C * BLOCK_C - back + tl.arange(0, BLOCK_C)
        if BLOCK_C < HIDDEN:
            h = load_tile(h_ptr, row, column, tokens, HIDDEN).to(tl.float32)
            d = load_tile(d_normed_ptr, row, column, tokens, HIDDEN).to(tl.float32)
        for i in tl.static_range(len(d_narrow)):
            A = load_tile(A_ptr, i * BLOCK_R + tl.arange(0, BLOCK_R), column, R, HIDDEN)
            d = tl.dot(d_narrow[i], A, d, input_precision="ieee")
        # As one operation, so that h goes straight from where it was copied to into the layout of the product.
        out = tl.fma(h, -share, d * load_factor(weight_ptr, offset, column, HIDDEN)) * rstd
        if d_h_ptr is not None:
            out += load_tile(d_h_ptr, row, column, tokens, HIDDEN).to(tl.float32)
        store_tile(out_ptr, out, row, column, tokens, HIDDEN)


@dataclass(frozen=True)
class Plan:
    """Launch parameters of a kernel."""

    num_warps: int
    constants: dict[str, int]

    def only(self, *names: str) -> Plan:
        """For a kernel that takes these constants."""
        return Plan(self.num_warps, {name: self.constants[name] for name in names})

    def launch(self, kernel: Any, arguments: tuple[Any, ...], like: Tensor, **constants: float) -> None:
        """Over the rows of `like`, of which there may be none."""
        if tokens := like.shape[0]:
            programs = triton.cdiv(tokens, self.constants["BLOCK_T"])
            with torch.cuda.device_of(like):  # type: ignore[no-untyped-call]
                kernel[(programs,)](*arguments, tokens, **self.constants, **constants, num_warps=self.num_warps)


@functools.lru_cache(maxsize=1024)  # a model has a few shapes, and asks at every call
def plan(card: Card, hidden: int, r: int, bytes_per_value: int) -> Plan:
    """For rows of `hidden` values, of which each takes `bytes_per_value`, and r columns of `narrow`."""
    whole = max(triton.next_power_of_2(hidden), 32)
    values = 8192 // bytes_per_value  # of a chunk
    block_r, num_stages = 16, 1
    if r == 0:
        block_t, block_c = max(values // whole, 1), whole
        num_warps = min(max(block_t * block_c // 512, 4), 16)
    else:
        small = card.shared_bytes < 96 << 10
        block_r = min(max(triton.next_power_of_2(r), 16), 64)
        # The more A or B there is to read, the more rows share it.
        block_t = 16 if r <= 32 or small else 32
        values //= 2 if small else 1
        block_c = min(max(hidden & -hidden, 64), values // block_t, whole)
        num_warps = min(max(block_t * block_c // 256, 4), 16)  # a load of 16 bytes a thread and tensor
        padded = -(-r // block_r) * block_r
        stage_bytes = (3 * block_t + padded) * block_c * bytes_per_value
        left_bytes = max(card.shared_bytes * block_t // 32 - 16 * 1024 - block_t * padded * bytes_per_value, 0)
        num_stages = min(1 + left_bytes // stage_bytes, 4)
    blocks = {"BLOCK_R": block_r, "BLOCK_T": block_t, "BLOCK_C": block_c, "NUM_STAGES": num_stages}
    return Plan(num_warps, {"HIDDEN": hidden, "R": r, **blocks})


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
    """`add_norm` on the card."""
    h, normed, rstd = _empty(delta), _empty(delta), _a_row(delta)
    _add_norm(h, normed, rstd, None, None, residual, delta, narrow, B, weight, scaling, eps, offset)
    return h, normed, rstd


def add_norm_fp8(
    residual: Tensor | None,
    delta: Tensor,
    narrow: Tensor | None,
    B: Tensor | None,
    scaling: float,
    weight: Tensor,
    eps: float,
    offset: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`add_norm_fp8` on the card."""
    made = _empty(delta), _empty(delta), _a_row(delta), *_empty_fp8(delta)
    _add_norm(*made, residual, delta, narrow, B, weight, scaling, eps, offset)
    return made


def norm(h: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """`norm` on the card."""
    normed, rstd = _empty(h), _a_row(h)
    _add_norm(None, normed, rstd, None, None, None, h, None, None, weight, 1.0, eps, offset)
    return normed, rstd


def norm_fp8(h: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`norm_fp8` on the card."""
    made = _empty(h), _a_row(h), *_empty_fp8(h)
    _add_norm(None, *made, None, h, None, None, weight, 1.0, eps, offset)
    return made


def norm_again(h: Tensor, rstd: Tensor, weight: Tensor, offset: float) -> Tensor:
    """`norm_again` on the card."""
    normed = _empty(h)
    _norm_again(normed, None, None, h, rstd, weight, offset)
    return normed


def norm_again_fp8(h: Tensor, rstd: Tensor, weight: Tensor, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    """`norm_again_fp8` on the card."""
    made = _empty(h), *_empty_fp8(h)
    _norm_again(*made, h, rstd, weight, offset)
    return made


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
    """`norm_backward` on the card."""
    out = _empty(h)
    tensors = [None if x is None else x.contiguous() for x in (d_normed, d_narrow, narrow, A, d_h, h, rstd, weight)]
    _plan(h, d_narrow).launch(norm_backward_kernel, (out, *tensors, offset), h)
    return out


def _norm_again(*tensors_and_scalars: Any) -> None:
    *tensors, offset = tensors_and_scalars
    tensors = [None if x is None else x.contiguous() for x in tensors]
    h = tensors[3]
    whole_rows = _plan(h, None).only("HIDDEN", "BLOCK_T", "BLOCK_C")
    whole_rows.launch(norm_again_kernel, (*tensors, offset), h, **LIMITS)


def _add_norm(*tensors_and_scalars: Any) -> None:
    *tensors, scaling, eps, offset = tensors_and_scalars
    tensors = [None if x is None else x.contiguous() for x in tensors]
    delta, narrow = tensors[6:8]
    _plan(delta, narrow).launch(add_norm_kernel, (*tensors, scaling, eps, offset), delta, **LIMITS)


def _plan(rows: Tensor, narrow: Tensor | None) -> Plan:
    r = 0 if narrow is None else narrow.shape[1]
    return plan(card_of(rows.device), rows.shape[1], r, rows.element_size())


def _empty(rows: Tensor) -> Tensor:
    return rows.new_empty(rows.shape)


def _a_row(rows: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], dtype=torch.float32)


def _empty_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape, dtype=E4M3), _a_row(rows)[:, None]


def compile_cases(card: Card) -> list[KernelCase]:
    """All kernels, with and without adapters, over wide and narrow rows, and in fp32."""
    half = half_type(card)
    adding = [(4096, 0, half), (4096, 16, half), (4096, 128, half), (576, 16, half), (4096, 16, "fp32")]
    backward = [(8192, 0, half), (4096, 48, half), (4096, 384, half), (576, 48, half), (576, 48, "fp32")]
    again = [(hidden, 0, half) for hidden in (576, 4096, 8192)]
    with_fp8 = card.capability >= (8, 9)
    return [
        *(_case(card, "add_norm", add_norm_kernel, *case) for case in adding),
        *(_case(card, "d_norm", norm_backward_kernel, *case) for case in backward),
        *(_case(card, "norm_again", norm_again_kernel, *case) for case in again),
        *(_case(card, "add_norm_fp8", add_norm_kernel, *case, fp8=True) for case in adding[:4] * with_fp8),
        *(_case(card, "norm_again_fp8", norm_again_kernel, *case, fp8=True) for case in again * with_fp8),
    ]


def _case(card: Card, name: str, kernel: Any, hidden: int, r: int, dtype: str, *, fp8: bool = False) -> KernelCase:
    launch = plan(card, hidden, r, 4 if dtype == "fp32" else 2)
    types = {argument: f"*{dtype}" for argument in kernel.arg_names if argument.endswith("_ptr")}
    types |= {"rstd_ptr": "*fp32", "scaling": "fp32", "eps": "fp32", "offset": "fp32", "tokens": "i32"}
    constants: dict[str, Any] = launch.constants | LIMITS
    if fp8:
        types |= {"values_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
    else:
        constants |= {"values_ptr": None, "scale_ptr": None}
    signature = {argument: types[argument] for argument in kernel.arg_names if argument in types.keys() - constants}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return KernelCase(f"{name} {hidden} {r} {dtype}", kernel, signature, constants, launch.num_warps)
