"""Rows of a matrix that lies in host memory, taken to the device without the host's knowing which.

Legend: n = rows that are taken; hidden = width of the matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.ops import triton


@torch.library.custom_op("nybble::gather_rows", mutates_args=())
def gather_rows(matrix: Tensor, index: Tensor) -> Tensor:
    """matrix[index], (n, hidden), on the device of index (n,) int64.

    With `index` on a GPU the matrix (rows, hidden) may lie there or in page-locked host memory, which the kernel reads
    over the bus. Indices are not known to the host then: one outside of the matrix gives a row of NaN.
    """
    return matrix.index_select(0, index)


@gather_rows.register_fake
def _(matrix: Tensor, index: Tensor) -> Tensor:
    return index.new_empty((len(index), matrix.shape[1]), dtype=matrix.dtype)


if triton.available():

    @gather_rows.register_kernel("cuda")
    def _(matrix: Tensor, index: Tensor) -> Tensor:
        from nybble.ops.triton import gather as kernels

        return kernels.gather_rows(matrix, index)
