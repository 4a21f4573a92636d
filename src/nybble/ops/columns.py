"""The columns of a weight quantized to NF4 one after the other, each with what those before it left to it.

A row knows nothing of the others. Legend: rows = out_features; n = columns that are quantized one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.ops import triton
from nybble.ops.nf4 import levels, midpoints


@torch.library.custom_op("nybble::quantize_columns", mutates_args=())
def quantize_columns(open_: Tensor, scales: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """The levels' numbers of values `open_`, uint8, whose errors go on to the columns behind, and these errors, fp32.

    All (rows, n). scales: of the values, of any sign; one of 0 gives 0's level. factor: (n, n); its row j says how the
    error of column j, in units of factor[j, j], is taken from those behind it. Errors are in these units.
    """
    table = levels(open_.device)
    borders = midpoints(table)
    values, scales = open_.t().clone(memory_format=torch.contiguous_format), scales.t().contiguous()
    divisors = scales.masked_fill(scales == 0, torch.inf)
    errors, chosen = torch.empty_like(values), torch.empty_like(values, dtype=torch.int32)
    rows = zip(values, scales, divisors, errors, chosen, strict=True)  # a column lies in one piece
    for column, (value, scale, divisor, error, level) in enumerate(rows):
        torch.bucketize(value / divisor, borders, out_int32=True, out=level)
        torch.sub(value, table.index_select(0, level) * scale, out=error).div_(factor[column, column])
        values[column + 1 :] -= factor[column, column + 1 :, None] * error
    return chosen.t().to(torch.uint8, memory_format=torch.contiguous_format), errors.t().contiguous()


@quantize_columns.register_fake
def _(open_: Tensor, scales: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return _empty(open_)


@torch.library.custom_op("nybble::refit_columns", mutates_args=())
def refit_columns(index: Tensor, scales: Tensor, pull: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """The levels' numbers of columns, uint8, each the best beside the others as they are by then, and their change.

    All (rows, n). index: their numbers so far, uint8. scales: as above. pull: what is lacking of the wanted values, in
    all columns, times the metric, as it is in these. metric: (n, n), their part of it.
    """
    table = levels(index.device)
    borders = midpoints(table)
    scales, pulls = scales.t().contiguous(), pull.t().clone(memory_format=torch.contiguous_format)
    divisors = scales.masked_fill(scales == 0, torch.inf)
    values = table[index.t().int()] * scales
    changes, chosen = torch.empty_like(values), torch.empty_like(values, dtype=torch.int32)
    rows = zip(values, scales, divisors, pulls, changes, chosen, strict=True)
    for column, (value, scale, divisor, pulled, change, level) in enumerate(rows):
        wanted = (value + pulled / metric[column, column]).div_(divisor)
        torch.bucketize(wanted, borders, out_int32=True, out=level)
        torch.sub(table.index_select(0, level) * scale, value, out=change)
        pulls[column + 1 :] -= metric[column, column + 1 :, None] * change
    return chosen.t().to(torch.uint8, memory_format=torch.contiguous_format), changes.t().contiguous()


@refit_columns.register_fake
def _(index: Tensor, scales: Tensor, pull: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return _empty(pull)


def _empty(like: Tensor) -> tuple[Tensor, Tensor]:
    index = torch.empty(like.shape, dtype=torch.uint8, device=like.device)
    return index, torch.empty(like.shape, dtype=torch.float32, device=like.device)


if triton.available():

    @quantize_columns.register_kernel("cuda")
    def _(open_: Tensor, scales: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        from nybble.ops.triton import columns as kernels

        return kernels.quantize_columns(open_, scales, factor)

    @refit_columns.register_kernel("cuda")
    def _(index: Tensor, scales: Tensor, pull: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
        from nybble.ops.triton import columns as kernels

        return kernels.refit_columns(index, scales, pull, metric)
