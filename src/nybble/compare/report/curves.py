"""How losses went over the seeds of an arm: the mean, and the best and the worst of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from statistics import fmean
from typing import NamedTuple

from nybble.compare.result import ArmResult, SeedResult

# A curve of fewer evaluations says no more than a table's "before" and "after".
_LEAST_EVALUATIONS = 3
# Points a curve, more than a picture has room to show.
_MOST_POINTS = 200
# Of a run, over which the losses of its steps are averaged: a step sees a few rows alone.
_SMOOTHED_SHARE = 0.05


class Point(NamedTuple):
    """Losses over the seeds at one step. seconds: of training until then, mean over the seeds."""

    step: int
    seconds: float
    mean: float
    low: float
    high: float


def shows_validation(arms: Sequence[ArmResult]) -> bool:
    """Whether any of them has enough of it: pictures and tables show the same losses of all arms."""
    return any(len(validation_curve(arm)) >= _LEAST_EVALUATIONS for arm in arms)


def validation_curve(arm: ArmResult) -> list[Point]:
    return _over_seeds(arm, [_evaluations(run) for run in arm.finished])


def training_curve(arm: ArmResult) -> list[Point]:
    points = _over_seeds(arm, [_smoothed(run) for run in arm.finished])
    if len(points) <= _MOST_POINTS:
        return points
    return [points[round(n * (len(points) - 1) / (_MOST_POINTS - 1))] for n in range(_MOST_POINTS)]


def _evaluations(run: SeedResult) -> dict[int, float]:
    return dict(zip(run.curve.validation_steps, run.curve.validation_losses, strict=True))


def _smoothed(run: SeedResult) -> dict[int, float]:
    """At each step the mean of the last few losses; the first ones are left out, as they have no such mean."""
    losses, window = run.curve.losses, max(1, round(_SMOOTHED_SHARE * len(run.curve.losses)))
    sums = [0.0, *accumulate(losses)]
    means = [(sums[n] - sums[n - window]) / window for n in range(window, len(sums))]
    return dict(zip(run.curve.steps[window - 1 :], means, strict=True))


def _over_seeds(arm: ArmResult, runs: Sequence[Mapping[int, float]]) -> list[Point]:
    """At the steps that all runs have."""
    clocks = [dict(zip(run.curve.steps, run.curve.seconds, strict=True)) for run in arm.finished]
    points = []
    for step in runs[0] if runs else ():
        if all(step in run for run in runs):
            values = [run[step] for run in runs]
            seconds = fmean(clock.get(step, 0.0) for clock in clocks)  # step 0 is before the clock starts
            points.append(Point(step, seconds, fmean(values), min(values), max(values)))
    return points
