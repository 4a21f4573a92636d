"""Kernels that make e4m3; `nybble.ops.fp8` is their definition. For compute capability 8.9 and above.

A transposed weight is written along its rows, which are columns of the one that is read. Each thread takes four
neighbouring rows, so that what changes threads through shared memory is four bytes wide and not one.
Legend: tile = 4 * QUADS rows of COLUMNS values of a weight (out, in).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.ops.fp8 import E4M3, E4M3_MAX, SMALLEST_ABSMAX
from nybble.ops.nf4 import absmax_levels, levels
from nybble.ops.triton import nf4
from nybble.ops.triton.launch import WARP_SIZE, Card, KernelCase, card_of

# A fused multiply-add rounds once where the reference rounds twice.
_OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}


@triton.jit
def scale_of(absmax, MAX: tl.constexpr, SMALLEST: tl.constexpr):
    return tl.where(absmax < SMALLEST, 1.0, tl.div_rn(absmax, MAX))


@triton.jit
def magnitude(x):
    """tl.max drops NaN; as infinity it reaches the scale, and makes NaN of the row."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def load_row(x_ptr, column_scale_ptr, column, columns):
    x = tl.load(x_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    if column_scale_ptr is not None:
        x *= tl.load(column_scale_ptr + column, mask=column < columns, other=0.0)
    return x


@triton.jit
def quantize_rows_kernel(
    values_ptr,  # e4m3 (rows, columns), or None: the scales alone
    scale_ptr,  # fp32 (rows,)
    x_ptr,  # (rows, columns)
    column_scale_ptr,  # fp32 (columns,), or None
    columns,
    values_stride,
    x_stride,
    MAX: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,  # a row is one block: it stays in registers
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    place = tl.arange(0, BLOCK)
    if WHOLE:
        x = load_row(x_ptr, column_scale_ptr, place, columns)
        peak = magnitude(x)
    else:
        peak = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, columns, BLOCK):
            peak = tl.maximum(peak, magnitude(load_row(x_ptr, column_scale_ptr, start + place, columns)))
    scale = scale_of(tl.max(peak, axis=0), MAX, SMALLEST)
    tl.store(scale_ptr + row, scale)
    if values_ptr is not None:
        factor = tl.div_rn(1.0, scale)
        values_ptr += row * values_stride
        if WHOLE:
            tl.store(values_ptr + place, (x * factor).to(tl.float8e4nv), mask=place < columns)
        else:
            for start in range(0, columns, BLOCK):
                x = load_row(x_ptr, column_scale_ptr, start + place, columns)
                column = start + place
                tl.store(values_ptr + column, (x * factor).to(tl.float8e4nv), mask=column < columns)


@triton.jit
def quad(x0, x1, x2, x3):
    """The same values of four neighbouring rows side by side in a thread: (..., 2, 2), flattened 0 to 3."""
    return tl.join(tl.join(x0, x2), tl.join(x1, x3))


@triton.jit
def store_transposed(ptr, quads, first_row, column, rows, columns, stride):
    """Store values (QUADS, ..., 2, 2) of `column` at (column, row) of an e4m3 matrix."""
    by_column = tl.permute(tl.reshape(quads.to(tl.float8e4nv), (quads.shape[0], column.shape[0], 4)), (1, 0, 2))
    tile = tl.reshape(by_column, (column.shape[0], 4 * quads.shape[0]))
    row = first_row + tl.arange(0, 4 * quads.shape[0])
    inside = (column[:, None] < columns) & (row[None, :] < rows)
    tl.store(ptr + column[:, None].to(tl.int64) * stride + row[None, :], tile, mask=inside)


@triton.jit
def load_scaled(weight_ptr, row_scale_ptr, row, column, rows, columns):
    scale = tl.load(row_scale_ptr + row, mask=row < rows, other=1.0)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    x = tl.load(weight_ptr + row[:, None].to(tl.int64) * columns + column[None, :], mask=inside, other=0.0)
    return x.to(tl.float32) * tl.div_rn(1.0, scale)[:, None]


@triton.jit
def transpose_kernel(
    values_ptr,  # e4m3 (in, out)
    row_scale_ptr,  # fp32 (out,)
    weight_ptr,  # (out, in)
    rows,
    columns,
    stride,
    QUADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first_row = tl.program_id(1) * (4 * QUADS)
    row = first_row + 4 * tl.arange(0, QUADS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    x0 = load_scaled(weight_ptr, row_scale_ptr, row, column, rows, columns)
    x1 = load_scaled(weight_ptr, row_scale_ptr, row + 1, column, rows, columns)
    x2 = load_scaled(weight_ptr, row_scale_ptr, row + 2, column, rows, columns)
    x3 = load_scaled(weight_ptr, row_scale_ptr, row + 3, column, rows, columns)
    store_transposed(values_ptr, quad(x0, x1, x2, x3), first_row, column, rows, columns, stride)


@triton.jit
def nf4_units_kernel(
    unit_ptr,  # fp32 (rows, blocks)
    row_scale_ptr,  # fp32 (rows,)
    absmax_ptr,  # uint8 (rows, blocks), or fp32 if GROUP_SIZE is 0
    group_absmax_ptr,  # fp32 (groups,)
    offset_ptr,  # fp32 (1,)
    absmax_levels_ptr,  # fp32 (256,)
    rows,
    blocks,
    GROUP_SIZE: tl.constexpr,
    MAX: tl.constexpr,
    SMALLEST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCKS)[None, :]
    inside = (row < rows) & (column < blocks)
    block = row * blocks + column
    absmax = tl.load(absmax_ptr + block, mask=inside, other=0)
    if GROUP_SIZE > 0:
        group_absmax = tl.load(group_absmax_ptr + block // GROUP_SIZE, mask=inside, other=0.0)
        absmax = tl.load(absmax_levels_ptr + absmax.to(tl.int32)) * group_absmax + tl.load(offset_ptr)
    peak = tl.max(tl.where(inside, magnitude(absmax), 0.0), axis=1, keep_dims=True)
    scale = scale_of(peak, MAX, SMALLEST)
    tl.store(row_scale_ptr + row, scale, mask=row < rows)
    tl.store(unit_ptr + block, tl.div_rn(absmax, scale), mask=inside)


@triton.jit
def load_codes(
    codes_ptr, unit_ptr, row, first_column, rows, columns, row_bytes, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr
):
    """Packed codes and the units of their blocks, both (QUADS, COLUMNS / SPAN, SPAN / 2)."""
    SPAN: tl.constexpr = min(BLOCK_SIZE, COLUMNS)
    span = first_column + tl.arange(0, COLUMNS // SPAN)[None, :] * SPAN
    inside = (row[:, None] < rows) & (span < columns)
    unit = tl.load(unit_ptr + row[:, None] * (columns // BLOCK_SIZE) + span // BLOCK_SIZE, mask=inside, other=0.0)
    byte = (row[:, None].to(tl.int64) * row_bytes + span // 2)[:, :, None] + tl.arange(0, SPAN // 2)[None, None, :]
    packed = tl.load(codes_ptr + byte, mask=inside[:, :, None], other=0).to(tl.int32)
    return packed, tl.broadcast_to(unit[:, :, None], packed.shape)


@triton.jit
def look_up(table, index):
    return tl.reshape(tl.gather(table, tl.reshape(index, (index.numel,)), 0), index.shape)


@triton.jit
def nf4_dequantize_transposed_kernel(
    values_ptr,  # e4m3 (columns, rows)
    codes_ptr,  # uint8 (rows, row_bytes)
    unit_ptr,  # fp32 (rows, columns / BLOCK_SIZE)
    levels_ptr,  # fp32 (16,)
    rows,
    columns,
    stride,
    row_bytes,
    BLOCK_SIZE: tl.constexpr,
    QUADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first_column, first_row = tl.program_id(0) * COLUMNS, tl.program_id(1) * (4 * QUADS)
    row = first_row + 4 * tl.arange(0, QUADS)
    packed0, unit0 = load_codes(codes_ptr, unit_ptr, row, first_column, rows, columns, row_bytes, BLOCK_SIZE, COLUMNS)
    packed1, unit1 = load_codes(
        codes_ptr, unit_ptr, row + 1, first_column, rows, columns, row_bytes, BLOCK_SIZE, COLUMNS
    )
    packed2, unit2 = load_codes(
        codes_ptr, unit_ptr, row + 2, first_column, rows, columns, row_bytes, BLOCK_SIZE, COLUMNS
    )
    packed3, unit3 = load_codes(
        codes_ptr, unit_ptr, row + 3, first_column, rows, columns, row_bytes, BLOCK_SIZE, COLUMNS
    )
    packed, unit = quad(packed0, packed1, packed2, packed3), quad(unit0, unit1, unit2, unit3)
    # From shared memory: from global memory, the 64-bit addresses alone would be two of ten instructions a value.
    table = tl.load(levels_ptr + tl.arange(0, 16))
    even = first_column + 2 * tl.arange(0, COLUMNS // 2)
    store_transposed(values_ptr, look_up(table, packed >> 4) * unit, first_row, even, rows, columns, stride)
    store_transposed(values_ptr, look_up(table, packed & 15) * unit, first_row, even + 1, rows, columns, stride)


def quantize_rows(x: Tensor, column_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """`fp8_quantize_rows` on the card."""
    values, scale = x.new_empty(x.shape, dtype=E4M3), x.new_empty(len(x), 1, dtype=torch.float32)
    _quantize_rows(values, scale, x, column_scale)
    return values, scale


def quantize_weight(values: Tensor, row_scale: Tensor, weight: Tensor) -> None:
    """`fp8_quantize_weight_into` on the card; the weight is read a second time where it is transposed."""
    if values.stride(1) == 1:
        _quantize_rows(values, row_scale, weight, None)
        return
    assert weight.is_contiguous()
    _quantize_rows(None, row_scale, weight, None)
    _launch_transposing(transpose_kernel, values, (row_scale, weight), (), _TRANSPOSED_WEIGHT)


def nf4_dequantize(
    values: Tensor,
    row_scale: Tensor,
    codes: Tensor,
    absmax: Tensor,
    group_absmax: Tensor | None,
    offset: Tensor | None,
    *,
    block_size: int,
    group_size: int,
) -> None:
    """`nf4_dequantize_fp8_into` on the card: a small kernel for the scales, then one pass over the weight."""
    rows, columns = values.shape
    if not values.numel():
        return
    unit = row_scale.new_empty(absmax.numel())
    if group_absmax is None:  # the kernel does not read these two then
        group_absmax, offset, group_size = absmax, absmax, 0
    blocks = columns // block_size
    constants = units_tile(blocks) | LIMITS | {"GROUP_SIZE": group_size}
    stored = absmax, group_absmax, offset, absmax_levels(values.device)
    with torch.cuda.device_of(values):  # type: ignore[no-untyped-call]
        grid = (triton.cdiv(rows, constants["ROWS"]),)
        nf4_units_kernel[grid](unit, row_scale, *stored, rows, blocks, **constants, **_OPTIONS)
    if values.is_contiguous():
        nf4.dequantize(values, codes, unit, None, None, block_size=block_size, group_size=0)
        return
    tensors = codes, unit, levels(values.device)
    _launch_transposing(
        nf4_dequantize_transposed_kernel, values, tensors, (columns // 2,), _TRANSPOSED_NF4, BLOCK_SIZE=block_size
    )


LIMITS = {"MAX": E4M3_MAX, "SMALLEST": SMALLEST_ABSMAX}
# 128 rows are the 128 bytes that are written side by side. 128 columns of NF4 are 16 bytes of codes a thread and row,
# and 64 columns of 16 bits are 32.
_TRANSPOSED_NF4 = {"QUADS": 32, "COLUMNS": 128}
_TRANSPOSED_WEIGHT = {"QUADS": 32, "COLUMNS": 64}
_TRANSPOSED_WARPS = 4


def rows_tile(card: Card, columns: int) -> tuple[dict[str, Any], int]:
    """Constants and number of warps with which two programs or more share a multiprocessor.

    A row stays in registers where that takes 16 values a thread or fewer, 16,384 on an H100. A longer one is read
    again, from a cache, and goes through 8 at a time.
    """
    most = 1 << ((card.max_threads // (2 * WARP_SIZE)).bit_length() - 1)
    if columns > 16 * WARP_SIZE * most:
        return {"BLOCK": 8 * WARP_SIZE * most, "WHOLE": False}, most
    block = triton.next_power_of_2(columns)
    return {"BLOCK": block, "WHOLE": True}, max(1, block // (16 * WARP_SIZE))


def units_tile(blocks: int) -> dict[str, int]:
    """16 rows of 64 blocks: 8 absmax values a thread."""
    width = triton.next_power_of_2(blocks)
    return {"ROWS": max(1, 1024 // width), "BLOCKS": width}


def _quantize_rows(values: Tensor | None, scale: Tensor, x: Tensor, column_scale: Tensor | None) -> None:
    rows, columns = x.shape
    if not x.numel():
        scale.fill_(1.0)
        return
    assert x.stride(1) == 1
    constants, num_warps = rows_tile(card_of(x.device), columns)
    strides = 0 if values is None else values.stride(0), x.stride(0)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        quantize_rows_kernel[(rows,)](
            values, scale, x, column_scale, columns, *strides, **constants, **LIMITS, num_warps=num_warps, **_OPTIONS
        )


def _launch_transposing(
    kernel: Any,
    values: Tensor,
    tensors: tuple[Tensor, ...],
    sizes: tuple[int, ...],
    tile: dict[str, int],
    **constants: Any,
) -> None:
    """Launch over tiles of `values` (rows, columns), which lies in memory column by column."""
    assert values.stride(0) == 1
    rows, columns = values.shape
    grid = triton.cdiv(columns, tile["COLUMNS"]), triton.cdiv(rows, 4 * tile["QUADS"])
    with torch.cuda.device_of(values):  # type: ignore[no-untyped-call]
        kernel[grid](
            values,
            *tensors,
            rows,
            columns,
            values.stride(1),
            *sizes,
            **tile,
            **constants,
            num_warps=_TRANSPOSED_WARPS,
            **_OPTIONS,
        )


def compile_cases(card: Card) -> list[KernelCase]:
    """None below compute capability 8.9, which has no conversion to e4m3."""
    if card.capability < (8, 9):
        return []
    values = {"values_ptr": "*fp8e4nv"}
    row_types = values | {"scale_ptr": "*fp32", "x_ptr": "*bf16", "columns": "i32", "values_stride": "i32"}
    row_types |= {"x_stride": "i32"}
    cases = []
    for columns, scaled in ((4096, False), (14336, False), (28672, True)):
        constants, num_warps = rows_tile(card, columns)
        types = row_types | ({"column_scale_ptr": "*fp32"} if scaled else {})
        constants |= LIMITS | ({} if scaled else {"column_scale_ptr": None})
        name = f"fp8_rows {columns}"
        cases.append(KernelCase(name, quantize_rows_kernel, types, constants, num_warps, _OPTIONS))

    sizes = dict.fromkeys(("rows", "columns", "stride"), "i32")
    types = values | {"row_scale_ptr": "*fp32", "weight_ptr": "*bf16"} | sizes
    cases.append(KernelCase("fp8_transpose", transpose_kernel, types, _TRANSPOSED_WEIGHT, _TRANSPOSED_WARPS, _OPTIONS))

    types = dict.fromkeys(("unit_ptr", "row_scale_ptr", "group_absmax_ptr", "offset_ptr", "absmax_levels_ptr"), "*fp32")
    types |= {"absmax_ptr": "*u8", "rows": "i32", "blocks": "i32"}
    constants = units_tile(64) | LIMITS | {"GROUP_SIZE": 256}
    cases.append(KernelCase("nf4_fp8_units", nf4_units_kernel, types, constants, 4, _OPTIONS))

    types = values | {"codes_ptr": "*u8", "unit_ptr": "*fp32", "levels_ptr": "*fp32"} | sizes | {"row_bytes": "i32"}
    constants = _TRANSPOSED_NF4 | {"BLOCK_SIZE": 64}
    kernel = nf4_dequantize_transposed_kernel
    cases.append(KernelCase("nf4_fp8_transposed", kernel, types, constants, _TRANSPOSED_WARPS, _OPTIONS))

    launch = nf4.plan(card, 14336 * 4096, 64, 1)
    pointers = ("absmax_ptr", "group_absmax_ptr", "offset_ptr", "levels_ptr", "absmax_levels_ptr")
    types = {"out_ptr": "*fp8e4nv", "codes_ptr": "*u8", "numel": "i32"} | dict.fromkeys(pointers, "*fp32")
    constants = launch.constants | {"GROUP_SIZE": 0}
    cases.append(KernelCase("nf4_dequantize e4m3", nf4.dequantize_kernel, types, constants, launch.num_warps, _OPTIONS))
    return cases
