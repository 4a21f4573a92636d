"""One linear in NF4, by what is known of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from nybble.adapters.provenance import Rounding
from nybble.calibrate.correction import low_rank_correction
from nybble.calibrate.finished import PreparedLinear
from nybble.calibrate.moments import InputMoments
from nybble.errors import UserError
from nybble.quant.compensation import error_factor, quantize_compensated
from nybble.quant.format import NF4Spec
from nybble.quant.linear import DenseLinear
from nybble.quant.rounding import quantize_searched
from nybble.quant.weight import NF4Weight

Quantize = Callable[[Tensor], NF4Weight]


def prepare_linears(
    linears: Mapping[str, DenseLinear], moments: InputMoments, spec: NF4Spec, rounding: Rounding, *, rank: int
) -> Iterator[tuple[str, PreparedLinear]]:
    """Quantize each of `linears`, by path, by what `moments` say of its inputs; one that was never called, by search.

    rank: of the correction of what quantizing leaves; 0: none. Raises UserError with the path of a linear whose weight
    or inputs are not finite.
    """
    rest = dict(linears)
    for paths, seen in moments.groups():
        quantize: Quantize | None = None
        for path in paths:
            weight = rest.pop(path).dequantize(torch.float32)
            try:
                quantize = quantize or _quantizer(seen, spec, rounding)
                quantized = quantize(weight)
            except UserError as error:
                raise UserError(error.what, where=path, fix=error.fix) from None
            difference = weight - quantized.dequantize(torch.float32)
            yield path, PreparedLinear(quantized, low_rank_correction(difference, seen, rank) if rank else None)
    for path, linear in rest.items():
        yield path, PreparedLinear(quantize_searched(linear.dequantize(torch.float32), spec))


def _quantizer(seen: Tensor, spec: NF4Spec, rounding: Rounding) -> Quantize:
    """How to quantize the weights of linears whose inputs have the second moments `seen`."""
    if rounding == "compensated":
        factor = error_factor(seen)
        return lambda weight: quantize_compensated(weight, factor, spec)
    if rounding == "weighted":
        return lambda weight: quantize_searched(weight, spec, importance=seen.diagonal())
    if rounding == "search":
        return lambda weight: quantize_searched(weight, spec)
    return lambda weight: NF4Weight.quantize(weight, spec)
