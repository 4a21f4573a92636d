"""NF4 weights whose errors make up for each other in the layer's output (GPTQ, arXiv 2210.17323, with NF4's levels).

Columns are quantized one after the other; the error of each is passed on to those that are still open, by as much as
their inputs go with its own, so that the sum over the inputs changes least. Those with the largest inputs come first:
their errors find the most columns open, and are themselves not moved. Scales are searched beforehand.

Legend: a linear's weight is (out, in); the second moments of its inputs, (in, in), are the mean of x x^T over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.errors import UserError
from nybble.ops.nf4 import levels, midpoints, pack
from nybble.quant.format import NF4Spec
from nybble.quant.rounding import search_stored
from nybble.quant.weight import NF4Weight

# Of the inputs' mean square, added to all of them: what the text hardly shows must not be given away. By 8,192 tokens
# of Python, SmolLM2-135M: 0.01, 0.1 and 1 close 41, 57 and 64 % of NF4's gap on Hamlet, 75, 78 and 77 on other Python.
DAMPING = 1.0
_COLUMNS = 64  # within which errors are passed on one by one; to those behind they go together


@dataclass(frozen=True)
class Compensation:
    """What the inputs of a linear say about its errors.

    order: its columns as they are to be quantized, (in,). factor: `error_factor` of the moments in that order.
    importance: mean squares of the inputs, (in,), by which scales are searched.
    """

    order: Tensor
    factor: Tensor
    importance: Tensor

    @classmethod
    def of(cls, moments: Tensor, damping: float = DAMPING) -> Compensation:
        """From the second moments of the inputs; raises UserError if they are not finite."""
        importance = moments.diagonal()
        order = importance.argsort(descending=True, stable=True)
        return cls(order, error_factor(moments, order, damping), importance)


def quantize_compensated(weight: Tensor, inputs: Compensation, spec: NF4Spec) -> NF4Weight:
    """Quantize `weight` (out, in) for the least error of its output.

    Computed in fp32 on the device of `inputs`. Raises UserError if the weight holds NaN or infinity.
    """
    order, factor = inputs.order, inputs.factor
    whole = weight.detach().to(order.device, torch.float32)
    stored = search_stored(whole.reshape(-1), spec, importance=inputs.importance)
    absmax = stored.values.repeat_interleave(spec.block_size)[: whole.numel()].view_as(whole)[:, order]
    work, index = whole[:, order], torch.empty_like(whole, dtype=torch.uint8)
    for start in range(0, work.shape[1], _COLUMNS):
        columns, behind = slice(start, start + _COLUMNS), slice(start + _COLUMNS, None)
        chosen, errors = _quantize_columns(work[:, columns], absmax[:, columns], factor[columns, columns])
        index[:, order[columns]] = chosen
        work[:, behind] -= errors @ factor[columns, behind]
    return stored.weight(pack(index.view(-1)), tuple(weight.shape), spec)


def error_factor(moments: Tensor, order: Tensor, damping: float = DAMPING) -> Tensor:
    """The upper triangular U (in, in) with U^T U = (moments + damping * mean of their diagonal * I)^-1, all in `order`.

    Row j says how the error of column j is passed on to those behind. Raises UserError for moments that are not finite.

    No inverse is made: of the moments with rows and columns in reverse order, L L^T, the inverse of L is U in reverse.
    """
    backwards = order.flip(0)
    diagonal = moments.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise UserError("its inputs are not finite, so errors cannot be weighed", fix="Check the calibration text.")
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    damped, reverse = moments[backwards[:, None], backwards], diagonal[backwards]
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


def _quantize_columns(open_: Tensor, absmax: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """The levels' numbers of columns `open_`, whose errors go on to those behind, and errors in the factor's units.

    All of (out, columns); factor (columns, columns).
    """
    table = levels(open_.device)
    borders = midpoints(table)
    values, scales = open_.t().contiguous(), absmax.t().contiguous()  # a column lies in one piece
    divisors = torch.where(scales == 0, torch.inf, scales)  # as `nearest_index`: a scale of 0 gives 0's level
    errors, chosen = torch.empty_like(values), torch.empty_like(values, dtype=torch.int32)
    rows = zip(values, scales, divisors, errors, chosen, strict=True)
    # One column waits for the one before, so a GPU is kept busy by as few launches as can be.
    for column, (value, scale, divisor, error, level) in enumerate(rows):
        torch.bucketize(value / divisor, borders, out_int32=True, out=level)
        torch.sub(value, table.index_select(0, level) * scale, out=error).div_(factor[column, column])
        values[column + 1 :].addr_(factor[column, column + 1 :], error, alpha=-1)
    return chosen.t().to(torch.uint8), errors.t()
