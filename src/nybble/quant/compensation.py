"""NF4 weights whose errors make up for each other in the layer's output (GPTQ, arXiv 2210.17323, with NF4's levels).

Columns are quantized one after the other; the error of each is passed on to those that are still open, by as much as
their inputs go with its own, so that the sum over the inputs changes least. Those with the largest inputs come first:
their errors find the most columns open, and are themselves not moved. Scales are searched beforehand; afterwards scales
and codes are refitted beside each other. Behind layers that err, a weight is first moved to what comes nearest to the
16-bit model's outputs (GPTAQ, arXiv 2504.02692).

Legend: a linear's weight is (out, in); the second moments of its inputs, (in, in), are the mean of x x^T over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nybble.errors import UserError
from nybble.ops.columns import quantize_columns, refit_columns
from nybble.ops.nf4 import levels, pack
from nybble.quant.format import NF4Spec
from nybble.quant.rounding import StoredAbsmax, search_stored
from nybble.quant.weight import NF4Weight

# Of the median of the inputs' mean squares, added to all of them: what the text hardly shows must not be given away.
# SmolLM2-135M's layers 3 and 11, by 49,152 tokens of Python, on other Python: 0.1, 0.2 and 0.4 leave outputs that err
# alike, within 4 %, and 2 to 9 % less than with 0.3 of the mean. That is ruled by a few inputs where a row's first
# token is far larger than all others: of layer 11's down_proj 0.3 of the mean leaves 15 times the error.
DAMPING = 0.2
# Of refitting scales and codes. SmolLM2-135M's third layer, on other Python: the first takes 5 to 13 % off the error of
# the outputs, the second 1 to 2, two more together 1.
ROUNDS = 2
# Of the way to what makes up for the layers before: all of it overshoots. SmolLM2-135M, by 262,144 tokens of Python:
# predictions for other Python diverge from the 16-bit model's by 0.0436, 0.0376 and 0.0398 nats a token with a quarter,
# half and all of the way, and where tokens are weighed by 0.0374, 0.0345 and 0.0359.
AIM = 0.5
_COLUMNS = 64  # within which errors are passed on one by one; to those behind they go together


@dataclass(frozen=True)
class Compensation:
    """What the inputs of a linear say about its errors.

    order: its columns as they are to be quantized, (in,). factor: `error_factor` of the moments in that order.
    importance: mean squares of the inputs, (in,), by which scales are searched. metric: the damped moments, (in, in).
    """

    order: Tensor
    factor: Tensor
    importance: Tensor
    metric: Tensor

    @classmethod
    def of(cls, moments: Tensor, damping: float = DAMPING) -> Compensation:
        """From the second moments of the inputs; raises UserError if they are not finite."""
        importance = moments.diagonal()
        order = importance.argsort(descending=True, stable=True)
        factor = error_factor(moments, order, damping)  # takes the most memory, so it comes first
        metric = moments.clone()
        metric.diagonal().add_(damping * _typical(importance))
        return cls(order, factor, importance, metric)

    def aim(self, weight: Tensor, drift: Tensor) -> Tensor:
        """What `weight` is to become for inputs y where the 16-bit model has x, fp32 (out, in).

        drift: the mean of (x - y) y^T, (in, in). The weight V with the least mean square of W x - V y, and as much
        damping towards W as errors have, is the whole of the way; `AIM` of it is gone.
        """
        wanted = weight.to(drift.device, torch.float32)
        pull = (wanted @ drift)[:, self.order]
        moved = wanted.clone()
        moved[:, self.order] += AIM * (pull @ self.factor.t() @ self.factor)
        return moved


def quantize_compensated(weight: Tensor, inputs: Compensation, spec: NF4Spec, *, rounds: int = 0) -> NF4Weight:
    """Quantize `weight` (out, in) for the least error of its output.

    rounds: of going through all scales and then all codes again, each made the best beside all others.
    Computed in fp32 on the device of `inputs`. Raises UserError if the weight holds NaN or infinity.
    """
    order, factor = inputs.order, inputs.factor
    whole = weight.detach().to(order.device, torch.float32)
    stored = search_stored(whole.reshape(-1), spec, importance=inputs.importance)
    absmax = stored.values.repeat_interleave(spec.block_size)[: whole.numel()].view_as(whole)[:, order]
    work, index = whole[:, order], torch.empty_like(whole, dtype=torch.uint8)
    for start in range(0, work.shape[1], _COLUMNS):
        columns, behind = slice(start, start + _COLUMNS), slice(start + _COLUMNS, None)
        chosen, errors = quantize_columns(work[:, columns], absmax[:, columns], factor[columns, columns])
        index[:, order[columns]] = chosen
        work[:, behind].addmm_(errors, factor[columns, behind], alpha=-1)
    for _ in range(rounds):
        stored = refit_scales(whole, index, stored, inputs.metric, spec)
        refit_codes_(index, whole, stored, inputs, spec)
    return stored.weight(pack(index.view(-1)), tuple(weight.shape), spec)


def refit_codes_(index: Tensor, whole: Tensor, stored: StoredAbsmax, inputs: Compensation, spec: NF4Spec) -> None:
    """Go once through the columns of `index`, and give each the levels that are best beside those of all others."""
    table, order = levels(whole.device), inputs.order
    absmax = stored.values.repeat_interleave(spec.block_size)[: whole.numel()].view_as(whole)
    pull = (whole - table[index.int()] * absmax) @ inputs.metric
    for start in range(0, whole.shape[1], _COLUMNS):
        columns = order[start : start + _COLUMNS]
        metric = inputs.metric[columns[:, None], columns]
        chosen, change = refit_columns(index[:, columns], absmax[:, columns], pull[:, columns], metric)
        index[:, columns] = chosen
        pull.addmm_(change, inputs.metric[columns], alpha=-1)


def refit_scales(whole: Tensor, index: Tensor, stored: StoredAbsmax, metric: Tensor, spec: NF4Spec) -> StoredAbsmax:
    """Go once through the blocks of a row, all rows together, and give each the scale that is best beside all others.

    Scales stay such as can be stored. Where a block reaches over two rows they are left as they are.
    """
    rows, blocks = whole.shape[0], whole.shape[1] // spec.block_size
    if whole.shape[1] % spec.block_size:
        return stored
    level = levels(whole.device)[index.int()]
    scales = stored.values.view(rows, blocks).clone()
    codes = stored.absmax.view(rows, blocks).clone()
    residual = whole - (level.view(rows, blocks, -1) * scales[:, :, None]).view_as(whole)
    pull = ((residual @ metric).mul_(level)).view(rows, blocks, -1).sum(2)
    del residual
    for block in range(blocks):
        columns = slice(block * spec.block_size, (block + 1) * spec.block_size)
        along = (level[:, columns] @ metric[columns]).mul_(level).view(rows, blocks, -1).sum(2)
        wanted = scales[:, block] + (pull[:, block] / along[:, block]).nan_to_num_(0.0, posinf=0.0, neginf=0.0)
        codes[:, block], found = stored.nearest(wanted, slice(block, None, blocks), spec)
        pull.addcmul_((found - scales[:, block])[:, None], along, value=-1)
        scales[:, block] = found
    return replace(stored, absmax=codes.view(-1), values=scales.view(-1))


def error_factor(moments: Tensor, order: Tensor, damping: float = DAMPING) -> Tensor:
    """The upper triangular U (in, in) with U^T U = (moments + damping * median of their diagonal * I)^-1, in `order`.

    Row j says how the error of column j is passed on to those behind. Raises UserError for moments that are not finite.

    No inverse is made: of the moments with rows and columns in reverse order, L L^T, the inverse of L is U in reverse.
    """
    backwards = order.flip(0)
    diagonal = moments.diagonal()
    require_finite_moments(moments)
    unit = _typical(diagonal)
    damped, reverse = moments[backwards[:, None], backwards], diagonal[backwards]
    for _ in range(5):
        damped.diagonal().copy_(reverse + damping * unit)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
            return inverse.flip((0, 1))
        damping *= 10
    raise UserError("the second moments of its inputs are of no positive matrix", fix="Use more calibration text.")


def require_finite_moments(moments: Tensor) -> None:
    if not bool(torch.isfinite(moments.diagonal()).all()):
        raise UserError("its inputs are not finite, so errors cannot be weighed", fix="Check the calibration text.")


def _typical(mean_squares: Tensor) -> Tensor:
    """Their median; where half of the inputs are about nothing, a little of the mean."""
    tiny = torch.finfo(torch.float32).tiny
    return torch.maximum(mean_squares.median(), 1e-4 * mean_squares.mean()).clamp(min=tiny)


def output_error(weight: Tensor, other: Tensor, moments: Tensor) -> float:
    """Mean square of the difference that `other` makes to the outputs of `weight`, over the outputs' mean square."""
    difference = weight.float() - other.float()
    change, whole = ((matrix @ moments * matrix).sum() for matrix in (difference, weight.float()))
    return float(change / whole)
