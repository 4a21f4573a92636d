"""Both gradients of low-rank pairs from one read of what flows back; `nybble.ops.low_rank` is their definition.

d_output (tokens, out) is cut into stripes of BLOCK_N columns, none of which belongs to two parts, and each stripe into
tiles of BLOCK_T rows. All programs take the same number of tiles, one after another and stripe by stripe, so that they
end together whatever the shape is. A tile is loaded once into shared memory and multiplied twice: its rows of d_narrow
are written for this stripe alone, and d_B of the stripe stays in registers until the program leaves it. A second kernel
sums the pieces, in a fixed order.

At 8192 x 28672 and r = 16, d_output is 470 MB (157 us at 3 TB/s, twice that where two GEMMs read it), and d_narrow in
56 pieces 29 MB, d_B in 4 at most 7 MB, both written and read: 542 MB, 181 us. The share of the pieces of d_narrow is
4 r / BLOCK_N, so BLOCK_N is large, and r ends at 64, where it is as much as a second read.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.ops.stripes import Stripes, largest_rank
from nybble.ops.triton.glu import load_tile, store_tile
from nybble.ops.triton.launch import Card, KernelCase, card_of, half_type

_OPTIONS = {"num_warps": 8, "num_stages": 3}
_SUM_BLOCK = 256  # values that a program sums, of 8 pieces at once: four loads of 16 bytes a thread


@triton.jit(do_not_specialize=["tokens", "tiles_per_program"])
def low_rank_backward_kernel(
    d_narrow_ptr,  # fp32 (stripes, tokens, R)
    d_B_ptr,  # fp32 (pieces, out, R)
    d_output_ptr,  # (tokens, out)
    narrow_ptr,  # (tokens, parts * R)
    B_ptr,  # (out, R)
    tokens,
    tiles_per_program,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,  # where each part begins in out, and where the last ends
    STRIPES: tl.constexpr,  # the same, counted in stripes
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    PARTS: tl.constexpr = len(STRIPES) - 1
    OUT: tl.constexpr = COLUMNS[PARTS]
    row_tiles = tl.cdiv(tokens, BLOCK_T)
    first = tl.program_id(0) * tiles_per_program
    last = min(first + tiles_per_program, STRIPES[PARTS] * row_tiles)
    for stripe in range(first // row_tiles, tl.cdiv(last, row_tiles)):
        part, n, n_end = 0, 0, 0
        for p in tl.static_range(PARTS):
            if stripe >= STRIPES[p]:
                part = p
                n = COLUMNS[p] + (stripe - STRIPES[p]) * BLOCK_N
                n_end = COLUMNS[p + 1]
        begin = stripe * row_tiles
        B = load_tile(B_ptr, n, 0, n_end, R, R, BLOCK_N, BLOCK_R)
        d_B = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        for row_tile in range(max(first - begin, 0), min(last - begin, row_tiles)):
            t = row_tile * BLOCK_T
            d = load_tile(d_output_ptr, t, n, tokens, n_end, OUT, BLOCK_T, BLOCK_N)
            narrow = load_tile(narrow_ptr + part * R, t, 0, tokens, R, PARTS * R, BLOCK_T, BLOCK_R)
            store_tile(d_narrow_ptr + tl.cast(stripe, tl.int64) * tokens * R, tl.dot(d, B), t, 0, tokens, R, R)
            d_B = tl.dot(tl.trans(d), narrow, d_B)
        piece = tl.program_id(0) - begin // tiles_per_program
        store_tile(d_B_ptr + tl.cast(piece, tl.int64) * OUT * R, d_B, n, 0, n_end, R, R)


@triton.jit
def sum_pieces(ptr, pieces, stride, place, BLOCK: tl.constexpr):
    """What lies at `place` in each of as many `pieces`, `stride` apart, summed; eight are loaded at once."""
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, tl.max(pieces, axis=0), 8):
        piece = first + tl.arange(0, 8)[:, None]
        source = ptr + tl.cast(piece, tl.int64) * stride + place[None, :]
        total += tl.sum(tl.load(source, mask=piece < pieces[None, :], other=0.0), axis=0)
    return total


@triton.jit(do_not_specialize=["tokens", "tiles_per_program"])
def low_rank_sum_kernel(
    d_narrow_ptr,  # (tokens, parts * R)
    d_B_ptr,  # fp32 (out, R)
    d_narrow_pieces_ptr,  # as the first kernel left them
    d_B_pieces_ptr,
    scaling,
    tokens,
    tiles_per_program,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIPES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    PARTS: tl.constexpr = len(STRIPES) - 1
    OUT: tl.constexpr = COLUMNS[PARTS]
    blocks = tl.cdiv(tokens * R, BLOCK)  # of one part of d_narrow; the programs after these sum d_B
    program = tl.program_id(0)
    if program < PARTS * blocks:
        part, place = program // blocks, program % blocks * BLOCK + tl.arange(0, BLOCK)
        inside = place < tokens * R
        first_stripe, stripes = 0, 0
        for p in tl.static_range(PARTS):
            if part == p:
                first_stripe, stripes = STRIPES[p], STRIPES[p + 1] - STRIPES[p]
        source_ptr = d_narrow_pieces_ptr + tl.cast(first_stripe, tl.int64) * tokens * R
        total = sum_pieces(source_ptr, tl.where(inside, stripes, 0), tokens * R, place, BLOCK)
        target = tl.cast(place // R, tl.int64) * PARTS * R + part * R + place % R
        tl.store(d_narrow_ptr + target, (scaling * total).to(d_narrow_ptr.dtype.element_ty), mask=inside)
    else:
        place = (program - PARTS * blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = place < OUT * R
        stripe = tl.zeros((BLOCK,), tl.int32)
        for p in tl.static_range(PARTS):
            column = place // R - COLUMNS[p]
            stripe = tl.where(column >= 0, STRIPES[p] + column // BLOCK_N, stripe)
        row_tiles = tl.cdiv(tokens, BLOCK_T)
        first = stripe * row_tiles // tiles_per_program  # the programs that had tiles of this stripe
        last = ((stripe + 1) * row_tiles - 1) // tiles_per_program
        total = sum_pieces(d_B_pieces_ptr, tl.where(inside, last - first + 1, 0), OUT * R, place, BLOCK)
        before = tl.load(d_B_ptr + place, mask=inside, other=0.0)
        tl.store(d_B_ptr + place, before + scaling * total, mask=inside)


@dataclass(frozen=True)
class Plan:
    """stripes: how the work is shared. cut: of it, the constants of both kernels."""

    stripes: Stripes
    cut: dict[str, Any]
    block_r: int


@functools.lru_cache(maxsize=1024)
def plan(card: Card, multiprocessors: int, tokens: int, r: int, sizes: tuple[int, ...]) -> Plan:
    how = Stripes.of(card.capability, multiprocessors, tokens, r, sizes)
    columns = (0, *accumulate(sizes))
    cut = {"R": r, "COLUMNS": columns, "STRIPES": how.bounds, "BLOCK_T": how.rows, "BLOCK_N": how.width}
    return Plan(how, cut, max(16, 1 << (r - 1).bit_length()))  # a matrix instruction sums over 16


def handles(d_output: Tensor, r: int) -> bool:
    """Whether the kernels are the faster way: matrix instructions multiply 16-bit values, and r is small enough."""
    in_half = d_output.dtype in (torch.bfloat16, torch.float16)
    return in_half and d_output.numel() > 0 and r <= largest_rank(card_of(d_output.device).capability)


def low_rank_backward_(
    d_B: Tensor, d_output: Tensor, narrow: Tensor, B: Tensor, scaling: float, sizes: list[int]
) -> Tensor:
    """`nybble.ops.low_rank.low_rank_backward_` on the card."""
    assert all(tensor.is_contiguous() for tensor in (d_B, d_output, narrow, B))
    tokens, (out, r), device = d_output.shape[0], B.shape, d_output.device
    how = plan(card_of(device), _multiprocessors(device), tokens, r, tuple(sizes))
    stripes = how.stripes
    d_narrow = torch.empty_like(narrow)
    d_narrow_pieces, d_B_pieces = d_B.new_empty(stripes.count, tokens, r), d_B.new_empty(stripes.pieces, out, r)
    sum_programs = len(sizes) * -(-tokens * r // _SUM_BLOCK) + -(-out * r // _SUM_BLOCK)
    with torch.cuda.device_of(d_output):  # type: ignore[no-untyped-call]
        low_rank_backward_kernel[(stripes.programs,)](
            d_narrow_pieces, d_B_pieces, d_output, narrow, B, tokens, stripes.tiles_per_program,
            **how.cut, BLOCK_R=how.block_r, **_OPTIONS,
        )  # fmt: skip
        low_rank_sum_kernel[(sum_programs,)](
            d_narrow, d_B, d_narrow_pieces, d_B_pieces, scaling, tokens, stripes.tiles_per_program,
            **how.cut, BLOCK=_SUM_BLOCK,
        )  # fmt: skip
    return d_narrow


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """How many the card has; four for Triton's interpreter, so that programs share stripes."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def compile_cases(card: Card) -> list[KernelCase]:
    """Both kernels for gate and up of a large model, with the rank that most adapters have and the largest."""
    ranks = (16,) if card.capability < (8, 0) else (16, 64)
    return [case for r in ranks for case in _cases(card, r)]


def _cases(card: Card, r: int) -> list[KernelCase]:
    how = plan(card, 128, 8192, r, (14336, 14336))
    half = f"*{half_type(card)}"
    types = {"tokens": "i32", "tiles_per_program": "i32", "scaling": "fp32", "d_narrow_pieces_ptr": "*fp32"}
    types |= {"d_B_pieces_ptr": "*fp32", "d_B_ptr": "*fp32", "d_output_ptr": half, "narrow_ptr": half, "B_ptr": half}

    def case(kernel: Any, d_narrow: str, num_warps: int, constants: dict[str, Any], **options: int) -> KernelCase:
        known = types | {"d_narrow_ptr": d_narrow}
        signature = {name: known[name] for name in kernel.arg_names if name in known}
        name = f"{kernel.__name__.removesuffix('_kernel')} r={r}"
        return KernelCase(name, kernel, signature, how.cut | constants, num_warps, options)

    return [
        case(low_rank_backward_kernel, "*fp32", constants={"BLOCK_R": how.block_r}, **_OPTIONS),
        case(low_rank_sum_kernel, half, 4, {"BLOCK": _SUM_BLOCK}),
    ]
