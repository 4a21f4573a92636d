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
from nybble.quant.compensation import Compensation, quantize_compensated
from nybble.quant.format import NF4Spec
from nybble.quant.linear import DenseLinear
from nybble.quant.rounding import quantize_searched
from nybble.quant.weight import NF4Weight

Quantize = Callable[[Tensor], NF4Weight]


def prepare_linears(
    linears: Mapping[str, DenseLinear], moments: InputMoments, spec: NF4Spec, rounding: Rounding, *, rank: int
) -> Iterator[tuple[str, PreparedLinear]]:
    """Quantize each of `linears`, by path, by what `moments` say of its inputs.

    rank: of the correction of what quantizing leaves; 0: none. A linear that was never called, as of an expert that no
    token came to, gets no correction, and is rounded to nearest or else by search. Raises UserError with the path of a
    linear whose weight or inputs are not finite.
    """
    for paths, seen in _by_inputs(linears, moments):
        quantize: Quantize | None = None
        for path in paths:
            weight = linears[path].dequantize(torch.float32)
            try:
                quantize = quantize or _quantizer(seen, spec, rounding)
                quantized = quantize(weight)
            except UserError as error:
                raise UserError(error.what, where=path, fix=error.fix) from None
            correction = None
            if rank and seen is not None:
                correction = low_rank_correction(weight - quantized.dequantize(torch.float32), seen, rank)
            yield path, PreparedLinear(quantized, correction, reached=seen is not None)


def _by_inputs(linears: Mapping[str, DenseLinear], moments: InputMoments) -> Iterator[tuple[list[str], Tensor | None]]:
    """Linears that share their inputs, with the second moments of these; None for those that were never called."""
    rest = dict(linears)
    for paths, seen in moments.groups():
        for path in paths:
            del rest[path]
        yield paths, seen
    yield list(rest), None


def _quantizer(seen: Tensor | None, spec: NF4Spec, rounding: Rounding) -> Quantize:
    """How to quantize the weights of linears whose inputs have the second moments `seen`."""
    if rounding == "nearest":
        return lambda weight: NF4Weight.quantize(weight, spec)
    if rounding == "search" or seen is None:
        return lambda weight: quantize_searched(weight, spec)
    if rounding == "weighted":
        return lambda weight: quantize_searched(weight, spec, importance=seen.diagonal())
    inputs = Compensation.of(seen)
    return lambda weight: quantize_compensated(weight, inputs, spec)
