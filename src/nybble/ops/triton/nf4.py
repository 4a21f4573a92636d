"""NF4 kernels. The references in `nybble.ops.nf4` are their definition, and they agree with them to the bit.

A program handles whole blocks, so where rows end does not matter. Legend: tile = BLOCKS blocks of BLOCK_SIZE values.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.ops.nf4 import absmax_levels, levels, midpoints
from nybble.ops.triton.launch import Card, KernelCase, card_of, elementwise_tile

# A fused multiply-add rounds once where the reference rounds twice.
_OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}


@triton.jit
def quantize_kernel(
    codes_ptr,  # uint8 (ceil(numel / 2),)
    absmax_ptr,  # fp32 (blocks,)
    weight_ptr,  # (numel,)
    borders_ptr,  # fp32 (15,)
    numel,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,  # numel fills every tile: no masks, so that accesses are vectorized
):
    HALF: tl.constexpr = BLOCK_SIZE // 2
    start = tl.program_id(0).to(tl.int64) * (BLOCKS * BLOCK_SIZE)
    remaining = numel - start
    row = tl.arange(0, BLOCKS)
    position = row[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    x = tl.load(weight_ptr + start + position, mask=(position < remaining) | EVEN, other=0.0).to(tl.float32)

    # tl.max drops NaN; as infinity it reaches absmax, where the caller looks for it.
    absmax = tl.max(tl.where(x == x, tl.abs(x), float("inf")), axis=1)
    tl.store(absmax_ptr + start // BLOCK_SIZE + row, absmax, mask=(row * BLOCK_SIZE < remaining) | EVEN)

    unit = x * tl.div_rn(1.0, absmax)[:, None]
    unit = tl.where(unit == unit, unit, 0.0)  # a block of zeros: 0 * inf
    index = tl.zeros((BLOCKS, BLOCK_SIZE), tl.int32)
    for i in tl.static_range(15):
        index += (unit > tl.load(borders_ptr + i)).to(tl.int32)

    high, low = tl.split(tl.reshape(index, (BLOCKS, HALF, 2)))
    byte = row[:, None] * HALF + tl.arange(0, HALF)[None, :]
    packed = ((high << 4) | low).to(tl.uint8)
    tl.store(codes_ptr + start // 2 + byte, packed, mask=(2 * byte < remaining) | EVEN)


@triton.jit
def dequantize_kernel(
    out_ptr,  # (numel,)
    codes_ptr,  # uint8 (ceil(numel / 2),)
    absmax_ptr,  # uint8 (blocks,), or fp32 if GROUP_SIZE is 0
    group_absmax_ptr,  # fp32 (groups,)
    offset_ptr,  # fp32 (1,)
    levels_ptr,  # fp32 (16,)
    absmax_levels_ptr,  # fp32 (256,)
    numel,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * (BLOCKS * BLOCK_SIZE)
    tile = start, codes_ptr, absmax_ptr, group_absmax_ptr, offset_ptr, levels_ptr, absmax_levels_ptr, numel
    dequantize_tile(out_ptr, *tile, BLOCK_SIZE, GROUP_SIZE, BLOCKS, EVEN)


@triton.jit
def dequantize_stack_kernel(
    out_ptr,  # the weights one behind the other
    codes_ptrs,  # tuples, an item a weight, as dequantize_kernel takes them
    absmax_ptrs,
    group_absmax_ptrs,
    offset_ptrs,
    levels_ptr,
    absmax_levels_ptr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,  # where each weight's tiles begin, and where the last ends
):
    program = tl.program_id(0).to(tl.int64)
    VALUES: tl.constexpr = BLOCKS * BLOCK_SIZE
    for i in tl.static_range(len(TILES) - 1):
        if (program >= TILES[i]) & (program < TILES[i + 1]):
            stored = codes_ptrs[i], absmax_ptrs[i], group_absmax_ptrs[i], offset_ptrs[i], levels_ptr, absmax_levels_ptr
            first_ptr = out_ptr + tl.cast(TILES[i], tl.int64) * VALUES
            tile = (program - TILES[i]) * VALUES
            dequantize_tile(first_ptr, tile, *stored, 0, BLOCK_SIZE, GROUP_SIZE, BLOCKS, True)


@triton.jit
def dequantize_tile(
    out_ptr,
    start,
    codes_ptr,
    absmax_ptr,
    group_absmax_ptr,
    offset_ptr,
    levels_ptr,
    absmax_levels_ptr,
    numel,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN: tl.constexpr,
):
    HALF: tl.constexpr = BLOCK_SIZE // 2
    remaining = numel - start
    row = tl.arange(0, BLOCKS)
    block = start // BLOCK_SIZE + row
    inside = (row * BLOCK_SIZE < remaining) | EVEN
    absmax = tl.load(absmax_ptr + block, mask=inside, other=0)
    if GROUP_SIZE > 0:
        group_absmax = tl.load(group_absmax_ptr + block // GROUP_SIZE, mask=inside, other=0.0)
        absmax = tl.load(absmax_levels_ptr + absmax.to(tl.int32)) * group_absmax + tl.load(offset_ptr)

    byte = row[:, None] * HALF + tl.arange(0, HALF)[None, :]
    packed = tl.load(codes_ptr + start // 2 + byte, mask=(2 * byte < remaining) | EVEN, other=0).to(tl.int32)
    # The 16 levels are one cache line. As selects instead, 15 a value, arithmetic would be the limit.
    high = tl.load(levels_ptr + (packed >> 4)) * absmax[:, None]
    low = tl.load(levels_ptr + (packed & 15)) * absmax[:, None]

    position = row[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    values = tl.interleave(high, low).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + start + position, values, mask=(position < remaining) | EVEN)


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched over all blocks of a weight."""

    programs: int
    num_warps: int
    constants: dict[str, Any]

    def __call__(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        with torch.cuda.device_of(arguments[0]):  # type: ignore[no-untyped-call]
            kernel[(self.programs,)](*arguments, **self.constants, **constants, num_warps=self.num_warps, **_OPTIONS)


@functools.lru_cache(maxsize=1024)  # a model has a few shapes, and asks at every call
def plan(card: Card, numel: int, block_size: int, bytes_per_value: int) -> Launch:
    """Launch parameters for `numel` values, of which each takes `bytes_per_value` on the wide side of the kernel."""
    tile = elementwise_tile(card, bytes_per_value=bytes_per_value, multiple_of=block_size)
    even = numel % tile.values == 0
    constants = {"BLOCK_SIZE": block_size, "BLOCKS": tile.values // block_size, "EVEN": even}
    return Launch(-(-numel // tile.values), tile.num_warps, constants)


def quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """`nf4_quantize` on the card."""
    flat = weight.reshape(-1)
    flat = flat.float() if flat.dtype == torch.float64 else flat
    numel = flat.numel()
    codes = flat.new_empty((numel + 1) // 2, dtype=torch.uint8)
    absmax = flat.new_empty(-(-numel // block_size), dtype=torch.float32)
    if numel:
        launch = plan(card_of(flat.device), numel, block_size, flat.element_size())
        launch(quantize_kernel, codes, absmax, flat, midpoints(levels(flat.device)), numel)
    return codes, absmax


def dequantize(
    out: Tensor,
    codes: Tensor,
    absmax: Tensor,
    group_absmax: Tensor | None,
    offset: Tensor | None,
    *,
    block_size: int,
    group_size: int,
) -> None:
    """`nf4_dequantize` on the card, both levels in one pass over memory."""
    assert out.is_contiguous()
    numel = out.numel()
    if group_absmax is None:  # the kernel does not read these two then
        group_absmax, offset, group_size = absmax, absmax, 0
    if numel:
        launch = plan(card_of(out.device), numel, block_size, out.element_size())
        stored = codes, absmax, group_absmax, offset
        tables = levels(out.device), absmax_levels(out.device)
        launch(dequantize_kernel, out, *stored, *tables, numel, GROUP_SIZE=group_size)


def dequantize_stack(
    out: Tensor,
    sizes: Sequence[int],
    codes: list[Tensor],
    absmax: list[Tensor],
    group_absmax: list[Tensor],
    offset: list[Tensor],
    *,
    block_size: int,
    group_size: int,
) -> None:
    """`nf4_dequantize_stack_` on the card: one launch where every weight fills its tiles."""
    assert out.is_contiguous()
    tile = elementwise_tile(card_of(out.device), bytes_per_value=out.element_size(), multiple_of=block_size)
    if not group_size:  # the kernels do not read these two then
        group_absmax, offset = absmax, absmax
    if any(size % tile.values for size in sizes):
        second_level = zip(group_absmax, offset, strict=True) if group_size else len(sizes) * [(None, None)]
        parts = torch.split(out.view(-1), list(sizes))
        for part, first, peaks, second in zip(parts, codes, absmax, second_level, strict=True):
            dequantize(part, first, peaks, *second, block_size=block_size, group_size=group_size)
        return
    tiles = tuple(accumulate((size // tile.values for size in sizes), initial=0))
    constants = {"BLOCK_SIZE": block_size, "BLOCKS": tile.values // block_size, "GROUP_SIZE": group_size}
    stored = tuple(codes), tuple(absmax), tuple(group_absmax), tuple(offset)
    tables = levels(out.device), absmax_levels(out.device)
    Launch(tiles[-1], tile.num_warps, constants)(dequantize_stack_kernel, out, *stored, *tables, TILES=tiles)


def compile_cases(card: Card) -> list[KernelCase]:
    """The kernels as large weights launch them on `card`."""
    return [
        _quantize_case(card),
        _dequantize_case(card, "bf16", 2),
        _dequantize_case(card, "fp32", 4),
        _dequantize_stack_case(card),
    ]


_LARGE = 14336 * 4096


def _quantize_case(card: Card) -> KernelCase:
    launch = plan(card, _LARGE, 64, 2)
    types = {"codes_ptr": "*u8", "absmax_ptr": "*fp32", "weight_ptr": "*bf16", "borders_ptr": "*fp32", "numel": "i32"}
    return KernelCase("nf4_quantize", quantize_kernel, types, launch.constants, launch.num_warps, _OPTIONS)


def _dequantize_case(card: Card, element_type: str, bytes_per_value: int) -> KernelCase:
    launch = plan(card, _LARGE, 64, bytes_per_value)
    types = {"out_ptr": f"*{element_type}", "codes_ptr": "*u8", "absmax_ptr": "*u8", "group_absmax_ptr": "*fp32"}
    types |= {"offset_ptr": "*fp32", "levels_ptr": "*fp32", "absmax_levels_ptr": "*fp32", "numel": "i32"}
    constants = launch.constants | {"GROUP_SIZE": 256}
    name = f"nf4_dequantize {element_type}"
    return KernelCase(name, dequantize_kernel, types, constants, launch.num_warps, _OPTIONS)


def _dequantize_stack_case(card: Card) -> KernelCase:
    """Query, key and value weights of an 8B model."""
    tile = elementwise_tile(card, bytes_per_value=2, multiple_of=64)
    types: dict[str, Any] = {"out_ptr": "*bf16", "levels_ptr": "*fp32", "absmax_levels_ptr": "*fp32"}
    types |= dict.fromkeys(("codes_ptrs", "absmax_ptrs"), 3 * ("*u8",))
    types |= dict.fromkeys(("group_absmax_ptrs", "offset_ptrs"), 3 * ("*fp32",))
    tiles = tuple(accumulate((rows * 4096 // tile.values for rows in (4096, 1024, 1024)), initial=0))
    constants = {"BLOCK_SIZE": 64, "BLOCKS": tile.values // 64, "GROUP_SIZE": 256, "TILES": tiles}
    return KernelCase("nf4_dequantize_stack", dequantize_stack_kernel, types, constants, tile.num_warps, _OPTIONS)
