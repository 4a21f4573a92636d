"""The kernel that gathers rows; `nybble.ops.gather` is its definition.

Page-locked host memory has addresses that a kernel can read. A program takes a row, so that hundreds of reads of 16
bytes are under way from each multiprocessor: over a bus they take microseconds to answer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.ops.triton.launch import Card, KernelCase, half_type

_MOST_COLUMNS = 4096  # of a row at a time: with 8 warps two vectors of 16 bytes a thread


@triton.jit
def gather_rows_kernel(
    out_ptr,  # (n, hidden)
    matrix_ptr,  # (rows, hidden)
    index_ptr,  # int64 (n,)
    rows,
    hidden,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(index_ptr + place)
    inside = (row >= 0) & (row < rows)
    for start in range(0, hidden, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = tl.load(matrix_ptr + row * hidden + column, mask=(column < hidden) & inside, other=float("nan"))
        tl.store(out_ptr + place * hidden + column, values, mask=column < hidden)


def _block(hidden: int) -> int:
    return min(_MOST_COLUMNS, int(triton.next_power_of_2(hidden)))


def gather_rows(matrix: Tensor, index: Tensor) -> Tensor:
    """`nybble.ops.gather.gather_rows` on the card of `index`."""
    assert matrix.is_contiguous()
    rows, hidden = matrix.shape
    out = torch.empty((len(index), hidden), dtype=matrix.dtype, device=index.device)
    if out.numel():
        with torch.cuda.device_of(index):  # type: ignore[no-untyped-call]
            gather_rows_kernel[(len(index),)](
                out, matrix, index.contiguous(), rows, hidden, BLOCK=_block(hidden), num_warps=8
            )
    return out


def compile_cases(card: Card) -> list[KernelCase]:
    """The embedding of an 8B model."""
    half = f"*{half_type(card)}"
    types = {"out_ptr": half, "matrix_ptr": half, "index_ptr": "*i64", "rows": "i32", "hidden": "i32"}
    return [KernelCase("gather_rows", gather_rows_kernel, types, {"BLOCK": _block(4096)}, 8)]
