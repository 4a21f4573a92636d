"""Differences to the reference as intervals on one axis, with the margin that was stated beforehand."""

from __future__ import annotations

from dataclasses import dataclass

from nybble.compare.report.scale import Scale, Tick
from nybble.compare.report.styles import Style, style
from nybble.compare.report.words import between, level, signed
from nybble.compare.result import Comparison


@dataclass(frozen=True)
class IntervalRow:
    """low, mean, high, seeds: in percent of the axis."""

    name: str
    style: Style
    low: float
    mean: float
    high: float
    seeds: tuple[float, ...]
    text: str
    verdict: str


@dataclass(frozen=True)
class Intervals:
    """zero, margin: in percent of the axis; beyond the margin an arm is worse."""

    rows: tuple[IntervalRow, ...]
    ticks: tuple[Tick, ...]
    zero: float
    margin: float
    margin_text: str
    reference: str


def difference_intervals(comparison: Comparison) -> Intervals | None:
    """None where there is no difference to show."""
    found = comparison.differences
    if not found:
        return None
    margin = comparison.statement.margin
    ends = [end for one in found for end in (one.interval.low, one.interval.high, *one.by_seed)]
    axis = Scale.over([0.0, margin, *ends], room=0.08)
    order = {arm.name: index for index, arm in enumerate(comparison.arms)}
    rows = tuple(
        IntervalRow(
            name=one.arm,
            style=style(order[one.arm]),
            low=axis.percent(one.interval.low),
            mean=axis.percent(one.mean),
            high=axis.percent(one.interval.high),
            seeds=tuple(axis.percent(value) for value in one.by_seed) if len(one.by_seed) > 1 else (),
            text=f"{signed(one.mean)} ({level(one.interval)}: {between(one.interval)})",
            verdict=one.verdict,
        )
        for one in found
    )
    ticks = tuple(axis.ticks(most=5))
    reference = comparison.statement.reference
    return Intervals(rows, ticks, axis.percent(0.0), axis.percent(margin), f"{margin:g}", reference)
