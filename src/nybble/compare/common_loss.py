"""The lowest loss that every run reached, and how long each took to reach it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from nybble.compare.result import Curve

# Steps whose losses on their own batches are averaged: arms see the same batches, but these differ in difficulty.
_WINDOW = 10
# So many evaluations after the first step are the least that a time can be read off.
_EVALUATIONS = 3


def common_loss(curves: Sequence[Curve]) -> tuple[float | None, str | None]:
    """The loss and what it is of: "validation" where every run was evaluated often enough, else "training"."""
    trained = [curve for curve in curves if curve.steps]
    if not trained:
        return None, None
    often = all(sum(step > 0 for step in curve.validation_steps) >= _EVALUATIONS for curve in trained)
    of = "validation" if often else "training"
    return max(min(loss for _, loss in _points(curve, of)) for curve in trained), of


def seconds_to(curve: Curve, loss: float, of: str) -> float | None:
    """Seconds of steps until the run had reached `loss`, between two points on the line that joins them."""
    before: tuple[float, float] | None = None
    for seconds, reached in _points(curve, of):
        if reached <= loss:
            if before is None or before[1] == reached:
                return seconds
            share = (before[1] - loss) / (before[1] - reached)
            return before[0] + share * (seconds - before[0])
        before = seconds, reached
    return None


def _points(curve: Curve, of: str) -> list[tuple[float, float]]:
    """(seconds, loss), in order."""
    if of == "validation":
        at = dict(zip(curve.steps, curve.seconds, strict=True)) | {0: 0.0}
        pairs = zip(curve.validation_steps, curve.validation_losses, strict=True)
        return [(at[step], loss) for step, loss in pairs if step in at]
    window = max(1, min(_WINDOW, len(curve.losses)))
    return [
        (curve.seconds[end - 1], fmean(curve.losses[end - window : end]))
        for end in range(window, len(curve.losses) + 1)
    ]
