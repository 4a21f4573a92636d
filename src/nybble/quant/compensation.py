"""NF4 weights whose errors make up for each other in the layer's output (GPTQ, arXiv 2210.17323, with NF4's levels).

Columns are quantized in order; the error of each is passed on to those that are still open, by as much as their inputs
go with its own, so that the sum over the inputs changes least. Scales are searched on the weights as they then are.

Legend: a linear's weight is (out, in); the second moments of its inputs, (in, in), are the mean of x x^T over tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nybble.errors import UserError
from nybble.ops.nf4 import absmax_levels, levels, midpoints, pack
from nybble.quant.format import NF4Spec
from nybble.quant.rounding import block_errors, search_absmax, search_stored
from nybble.quant.weight import NF4Weight

DAMPING = 0.01  # of an input's mean square, added to all of them: what the text hardly shows must not be given away


def quantize_compensated(weight: Tensor, factor: Tensor, spec: NF4Spec) -> NF4Weight:
    """Quantize `weight` (out, in) for the least error of its output; `factor` (in, in) is `error_factor` of its inputs.

    Computed in fp32 on the device of `factor`. Where blocks cross the ends of rows (in is no multiple of their size),
    all scales are searched beforehand. Raises UserError if the weight holds NaN or infinity.
    """
    work = weight.detach().to(factor.device, torch.float32, copy=True)
    # What an error of one column costs after the columns behind it have made up for it.
    importance = factor.diagonal().square().reciprocal()
    scales = _Scales(work, spec, importance)
    index = torch.empty_like(work, dtype=torch.uint8)
    for columns in scales.columns():
        absmax = scales.of(work, columns)
        errors = _quantize_columns(work[:, columns], absmax, factor[columns, columns], index[:, columns])
        work[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
    return scales.stored.weight(pack(index.view(-1)), tuple(weight.shape), spec)


def error_factor(moments: Tensor, damping: float = DAMPING) -> Tensor:
    """The upper triangular U (in, in) with U^T U = (moments + damping * mean of their diagonal * I)^-1.

    Row j says how the error of column j is passed on to those behind. Raises UserError for moments that are not finite.

    No inverse is made: of the moments with rows and columns in reverse order, L L^T, the inverse of L is U in reverse.
    """
    diagonal = moments.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise UserError("its inputs are not finite, so errors cannot be weighed", fix="Check the calibration text.")
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    damped, reverse = moments.flip((0, 1)), diagonal.flip(0)
    for _ in range(5):
        damped.diagonal().copy_(reverse + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
            return inverse.flip((0, 1))
        damping *= 10
    raise UserError("the second moments of its inputs are of no positive matrix", fix="Use more calibration text.")


def output_error(weight: Tensor, other: Tensor, moments: Tensor) -> float:
    """Mean square of the difference that `other` makes to the outputs of `weight`, over the outputs' mean square."""
    difference = weight.float() - other.float()
    change, whole = ((matrix @ moments * matrix).sum() for matrix in (difference, weight.float()))
    return float(change / whole)


class _Scales:
    """The scales of a weight's blocks, chosen as the columns come: those of a column of blocks at a time."""

    def __init__(self, weight: Tensor, spec: NF4Spec, importance: Tensor) -> None:
        # The second level is settled first. It is as fine for scales that are chosen later.
        self.stored = search_stored(weight.reshape(-1), spec, importance=importance)
        self._spec, self._importance, self._shape = spec, importance, weight.shape
        self._whole_blocks = weight.shape[1] % spec.block_size == 0

    def columns(self) -> Iterator[slice]:
        """Columns to be quantized together: those of one block, if blocks end where rows do."""
        step = self._spec.block_size
        return (slice(start, min(start + step, self._shape[1])) for start in range(0, self._shape[1], step))

    def of(self, weight: Tensor, columns: slice) -> Tensor:
        """The scale of each value in these columns of `weight`, as it now is: (out, columns), or (out, 1) if shared."""
        if not self._whole_blocks:
            values = self.stored.values.repeat_interleave(self._spec.block_size)[: weight.numel()]
            return values.view(self._shape)[:, columns]
        blocks = torch.arange(len(weight), device=weight.device) * (self._shape[1] // self._spec.block_size)
        blocks += columns.start // self._spec.block_size
        tile, importance = weight[:, columns].contiguous(), self._importance[columns]
        self._choose(tile, importance, blocks)
        return self.stored.values[blocks, None]

    def _choose(self, tile: Tensor, importance: Tensor, blocks: Tensor) -> None:
        """Store the best scale of each row of `tile` as that of `blocks`, rounded, unless the one it had is better."""
        before = self.stored.values[blocks]
        codes, values = self._rounded(search_absmax(tile, importance), blocks)
        better = block_errors(tile, values, importance) < block_errors(tile, before, importance)
        self.stored.values[blocks] = torch.where(better, values, before)
        self.stored.absmax[blocks] = torch.where(better, codes, self.stored.absmax[blocks])

    def _rounded(self, absmax: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Scales for these blocks under the second level as it is: what is stored for them and what is read."""
        group_absmax, offset = self.stored.group_absmax, self.stored.offset
        if group_absmax is None or offset is None:
            return absmax, absmax
        table, groups = absmax_levels(absmax.device), group_absmax[blocks // self._spec.group_size]
        unit = torch.where(groups == 0, 0.0, (absmax - offset) / groups)
        index = torch.bucketize(unit, midpoints(table), out_int32=True)
        return index.to(torch.uint8), table[index] * groups + offset


def _quantize_columns(open_: Tensor, absmax: Tensor, factor: Tensor, index: Tensor) -> Tensor:
    """Fill `index` for columns `open_`, whose errors go on to those behind; returns the errors in the factor's units.

    All of (out, columns); absmax may be (out, 1); factor (columns, columns).
    """
    table = levels(open_.device)
    borders = midpoints(table)
    divisors = torch.where(absmax == 0, torch.inf, absmax)  # as `nearest_index`: a scale of 0 gives 0's level
    values = open_.t().contiguous()  # a column lies in one piece
    errors, chosen = torch.empty_like(values), torch.empty_like(values, dtype=torch.int32)
    rows = zip(values, absmax.expand_as(open_).t(), divisors.expand_as(open_).t(), errors, chosen, strict=True)
    # One column waits for the one before, so a GPU is kept busy by as few launches as can be.
    for column, (value, scale, divisor, error, level) in enumerate(rows):
        torch.bucketize(value / divisor, borders, out_int32=True, out=level)
        torch.sub(value, table.index_select(0, level) * scale, out=error).div_(factor[column, column])
        values[column + 1 :].addr_(factor[column, column + 1 :], error, alpha=-1)
    index.copy_(chosen.t())
    return errors.t()
