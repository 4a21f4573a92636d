"""Linears in NF4 and corrections of them, by what is known of their inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from nybble.adapters.provenance import Rounding
from nybble.calibrate.correction import low_rank_correction
from nybble.calibrate.finished import PreparedLinear
from nybble.calibrate.moments import InputMoments, Seen
from nybble.errors import UserError
from nybble.quant.compensation import ROUNDS, Compensation, quantize_compensated, require_finite_moments
from nybble.quant.correction import Correction
from nybble.quant.format import NF4Spec
from nybble.quant.linear import DenseLinear
from nybble.quant.rounding import quantize_searched
from nybble.quant.weight import NF4Weight, require_finite

Quantize = Callable[[Tensor], NF4Weight]


def prepare_linears(
    linears: Mapping[str, DenseLinear], moments: InputMoments, spec: NF4Spec, rounding: Rounding, *, rank: int
) -> Iterator[tuple[str, PreparedLinear]]:
    """Quantize each of `linears`, by path, by what `moments` say of its inputs.

    rank: of the correction of what quantizing leaves, for the same inputs; 0: none. A linear that was never called, as
    of an expert that no token came to, gets no correction, and is rounded to nearest or else by search. Raises
    UserError with the path of a linear whose weight or inputs are not finite.
    """
    for paths, seen in _by_inputs(linears, moments):
        quantize: Quantize | None = None
        for path in paths:
            weight = linears[path].dequantize(torch.float32)
            with _naming(path):
                quantize = quantize or _quantizer(seen, spec, rounding)
                quantized = quantize(weight)
            correction = None
            if rank and seen is not None:
                correction = low_rank_correction(weight - quantized.dequantize(torch.float32), seen.moments, rank)
            yield path, PreparedLinear(quantized, correction, reached=seen is not None)


def correct_linears(
    linears: Mapping[str, DenseLinear], moments: InputMoments, quantized: Mapping[str, NF4Weight], rank: int
) -> Iterator[tuple[str, Correction]]:
    """The products that bring `quantized` nearest to what `linears` are to become for inputs of these `moments`.

    All by path. For a linear that got zeros alone all inputs count alike.
    """
    for paths, seen in _by_inputs(linears, moments):
        inputs: Compensation | None = None
        for path in paths:
            weight = linears[path].dequantize(torch.float32)
            known = seen or Seen(torch.eye(weight.shape[1], device=weight.device), None)
            with _naming(path):
                inputs = inputs or Compensation.of(known.moments)
            error = _target(weight, inputs, known) - quantized[path].dequantize(torch.float32)
            yield path, low_rank_correction(error, inputs.metric, rank)


def require_finite_weights(linears: Mapping[str, DenseLinear]) -> None:
    """Raise UserError with the path of one whose weight holds NaN or infinity."""
    for path, linear in linears.items():
        with _naming(path):
            require_finite(torch.stack(linear.weight.aminmax()))


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Inside, a UserError says that it is about the linear at `path`."""
    try:
        yield
    except UserError as error:
        raise UserError(error.what, where=path, fix=error.fix) from None


def _by_inputs(linears: Mapping[str, DenseLinear], moments: InputMoments) -> Iterator[tuple[list[str], Seen | None]]:
    """Linears that share their inputs, with what was seen of these; None for those that got none, or zeros alone.

    Raises UserError with the path of one whose inputs are not finite.
    """
    rest = dict(linears)
    for paths, seen in moments.groups():
        with _naming(paths[0]):
            require_finite_moments(seen.moments)
        for path in paths:
            del rest[path]
        yield paths, seen if bool(seen.moments.diagonal().any()) else None
    yield from (([path], None) for path in rest)


def _quantizer(seen: Seen | None, spec: NF4Spec, rounding: Rounding) -> Quantize:
    """How to quantize the weights of linears of whose inputs `seen` is known."""
    if rounding == "nearest":
        return lambda weight: NF4Weight.quantize(weight, spec)
    if rounding == "search" or seen is None:
        return lambda weight: quantize_searched(weight, spec)
    if rounding == "weighted":
        return lambda weight: quantize_searched(weight, spec, importance=seen.moments.diagonal())
    inputs = Compensation.of(seen.moments)
    return lambda weight: quantize_compensated(_target(weight, inputs, seen), inputs, spec, rounds=ROUNDS)


def _target(weight: Tensor, inputs: Compensation, seen: Seen) -> Tensor:
    """What `weight` is to become for inputs that have drifted; itself where no drift is known."""
    return weight if seen.drift is None else inputs.aim(weight, seen.drift)
