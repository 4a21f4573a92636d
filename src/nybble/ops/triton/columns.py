"""Kernels that quantize columns one after the other; `nybble.ops.columns` is their definition.

A program takes some rows and keeps their columns in registers: one launch for what are hundreds of PyTorch's, each
shorter than its own start. A column is taken out of the tile by a sum over its row, in which all others are 0.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.ops.nf4 import levels, midpoints
from nybble.ops.triton.launch import Card, KernelCase

_ROWS, _NUM_WARPS = 16, 4  # of a program: 4,096 rows are 256 programs
# A fused multiply-add rounds once where the reference rounds twice.
_OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}


@triton.jit
def quantize_columns_kernel(
    index_ptr,  # uint8 (rows, n)
    errors_ptr,  # fp32 (rows, n)
    open_ptr,  # fp32 (rows, n)
    scales_ptr,  # fp32 (rows, n)
    factor_ptr,  # fp32 (n, n)
    levels_ptr,  # fp32 (16,)
    borders_ptr,  # fp32 (15,)
    rows,
    n,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # n at most
):
    places, columns, inside = _tile(rows, n, ROWS, COLUMNS)
    values = tl.load(open_ptr + places, mask=inside, other=0.0)
    scales = tl.load(scales_ptr + places, mask=inside, other=0.0)
    index = tl.zeros((ROWS, COLUMNS), tl.int32)
    errors = tl.zeros((ROWS, COLUMNS), tl.float32)
    for column in range(n):
        here = columns == column
        value, scale = _column(values, here), _column(scales, here)
        level = _nearest(value, scale, borders_ptr)
        unit = tl.load(factor_ptr + column * n + column)
        error = tl.div_rn(value - tl.load(levels_ptr + level) * scale, tl.zeros_like(value) + unit)
        behind = tl.load(factor_ptr + column * n + columns, mask=(columns > column) & (columns < n), other=0.0)
        values -= behind[None, :] * error[:, None]
        index = tl.where(here[None, :], level[:, None], index)
        errors = tl.where(here[None, :], error[:, None], errors)
    tl.store(index_ptr + places, index.to(tl.uint8), mask=inside)
    tl.store(errors_ptr + places, errors, mask=inside)


@triton.jit
def refit_columns_kernel(
    found_ptr,  # uint8 (rows, n)
    changes_ptr,  # fp32 (rows, n)
    index_ptr,  # uint8 (rows, n)
    scales_ptr,  # fp32 (rows, n)
    pull_ptr,  # fp32 (rows, n)
    metric_ptr,  # fp32 (n, n)
    levels_ptr,  # fp32 (16,)
    borders_ptr,  # fp32 (15,)
    rows,
    n,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # n at most
):
    places, columns, inside = _tile(rows, n, ROWS, COLUMNS)
    scales = tl.load(scales_ptr + places, mask=inside, other=0.0)
    pulls = tl.load(pull_ptr + places, mask=inside, other=0.0)
    index = tl.load(index_ptr + places, mask=inside, other=0).to(tl.int32)
    values = tl.load(levels_ptr + index) * scales
    changes = tl.zeros((ROWS, COLUMNS), tl.float32)
    for column in range(n):
        here = columns == column
        value, scale, pulled = _column(values, here), _column(scales, here), _column(pulls, here)
        unit = tl.load(metric_ptr + column * n + column)
        wanted = value + tl.div_rn(pulled, tl.zeros_like(pulled) + unit)
        level = _nearest(wanted, scale, borders_ptr)
        change = tl.load(levels_ptr + level) * scale - value
        behind = tl.load(metric_ptr + column * n + columns, mask=(columns > column) & (columns < n), other=0.0)
        pulls -= behind[None, :] * change[:, None]
        index = tl.where(here[None, :], level[:, None], index)
        changes = tl.where(here[None, :], change[:, None], changes)
    tl.store(found_ptr + places, index.to(tl.uint8), mask=inside)
    tl.store(changes_ptr + places, changes, mask=inside)


@triton.jit
def _tile(rows, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Places of the tile's values, (ROWS, COLUMNS), the numbers of its columns, and which of the places there are."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (row[:, None] < rows) & (columns[None, :] < n)
    return row[:, None].to(tl.int64) * n + columns[None, :], columns, inside


@triton.jit
def _column(tile, here):
    """The column that is `here`, (ROWS,)."""
    return tl.sum(tl.where(here[None, :], tile, 0.0), axis=1)


@triton.jit
def _nearest(value, scale, borders_ptr):
    """Numbers of the levels nearest to values of these scales."""
    unit = tl.where(scale == 0.0, 0.0, tl.div_rn(value, scale))
    level = tl.zeros_like(value).to(tl.int32)
    for i in tl.static_range(15):
        level += (unit > tl.load(borders_ptr + i)).to(tl.int32)
    return level


def quantize_columns(open_: Tensor, scales: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """`nybble.ops.columns.quantize_columns` on the card."""
    return _launch(quantize_columns_kernel, open_, scales, factor)


def refit_columns(index: Tensor, scales: Tensor, pull: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """`nybble.ops.columns.refit_columns` on the card."""
    return _launch(refit_columns_kernel, index, scales, pull, metric)


def _launch(kernel: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    rows, n = inputs[0].shape
    device = inputs[0].device
    index = torch.empty((rows, n), dtype=torch.uint8, device=device)
    left = torch.empty((rows, n), dtype=torch.float32, device=device)
    if index.numel():
        held = [tensor.contiguous() for tensor in inputs]
        tables = levels(device), midpoints(levels(device))
        with torch.cuda.device_of(index):  # type: ignore[no-untyped-call]
            kernel[(triton.cdiv(rows, _ROWS),)](
                index, left, *held, *tables, rows, n, **_constants(n), num_warps=_NUM_WARPS, **_OPTIONS
            )
    return index, left


def _constants(n: int) -> dict[str, Any]:
    return {"ROWS": _ROWS, "COLUMNS": triton.next_power_of_2(n)}


def compile_cases(card: Card) -> list[KernelCase]:  # noqa: ARG001
    """64 columns at a time."""
    tables = {"levels_ptr": "*fp32", "borders_ptr": "*fp32", "rows": "i32", "n": "i32"}
    quantize = {"index_ptr": "*u8"} | dict.fromkeys(("errors_ptr", "open_ptr", "scales_ptr", "factor_ptr"), "*fp32")
    refit = {"found_ptr": "*u8", "changes_ptr": "*fp32", "index_ptr": "*u8"}
    refit |= dict.fromkeys(("scales_ptr", "pull_ptr", "metric_ptr"), "*fp32")
    return [
        KernelCase(name, kernel, types | tables, _constants(64), _NUM_WARPS, _OPTIONS)
        for name, kernel, types in (
            ("quantize_columns", quantize_columns_kernel, quantize),
            ("refit_columns", refit_columns_kernel, refit),
        )
    ]
