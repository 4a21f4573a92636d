"""Bars: memory by phase, measured and predicted; speed and the time to a loss, with every seed marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from nybble.compare.report.styles import Style, style
from nybble.compare.report.tables import peak_phases, predicted_phase
from nybble.compare.report.verdict import trained_arms
from nybble.compare.report.words import size, speed
from nybble.compare.result import ArmResult, Comparison, SeedResult
from nybble.units import format_bytes, format_seconds


@dataclass(frozen=True)
class Part:
    """A piece of a bar, in percent of the picture. style: of an arm or of what holds memory; None: of no one thing."""

    left: float
    width: float
    style: Style | None
    text: str


@dataclass(frozen=True)
class Bar:
    """seeds: where each run's own value lies, if there are several. expected: by a plan, not measured."""

    name: str
    parts: tuple[Part, ...]
    text: str
    seeds: tuple[float, ...] = ()
    expected: bool = False


@dataclass(frozen=True)
class BarGroup:
    """Bars under one heading; all groups of a picture have the same axis."""

    name: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class MemoryBars:
    """holders: what the parts of expected bars stand for, with how they are drawn. where: the device or the host."""

    groups: tuple[BarGroup, ...]
    holders: tuple[tuple[str, Style], ...]
    where: str


def memory_bars(comparison: Comparison) -> MemoryBars | None:
    """Peaks of the device's memory by phase, of the host's where there is no device; None where nothing was measured.

    Below a phase that the planner knows stands what it expected, by what holds it.
    """
    on_device = any(phase.device_bytes for arm in comparison.arms for phase in peak_phases(arm))
    measured = {
        arm.name: {
            phase.phase: (phase.device_bytes or 0) if on_device else phase.host_bytes for phase in peak_phases(arm)
        }
        for arm in comparison.arms
    }
    predicted = {
        arm.name: {phase: predicted_phase(arm, phase) if on_device else {} for phase in measured[arm.name]}
        for arm in comparison.arms
    }
    largest = max(
        [
            *(value for phases in measured.values() for value in phases.values()),
            *(sum(held.values()) for phases in predicted.values() for held in phases.values()),
        ],
        default=0,
    )
    if not largest:
        return None
    held = dict.fromkeys(
        name for phases in predicted.values() for held in phases.values() for name, nbytes in held.items() if nbytes
    )
    holders = {name: style(index) for index, name in enumerate(held)}
    groups = []
    for arm in comparison.arms:
        bars: list[Bar] = []
        for phase, nbytes in measured[arm.name].items():
            whole = Part(0.0, _percent(nbytes, largest), None, f"{phase}: {format_bytes(nbytes)}")
            bars.append(Bar(phase, (whole,), size(nbytes)))
            if expected := predicted[arm.name][phase]:
                parts = _stacked(expected, holders, largest)
                bars.append(Bar("predicted", parts, size(sum(expected.values())), expected=True))
        if bars:
            groups.append(BarGroup(arm.name, tuple(bars)))
    return MemoryBars(tuple(groups), tuple(holders.items()), "device" if on_device else "host")


def speed_bars(comparison: Comparison) -> list[BarGroup]:
    """Tokens a second, the time to the loss that all arms reached, energy; what was not measured is left out."""
    trained = trained_arms(comparison)
    to_loss = "" if comparison.common_loss is None else f" {comparison.common_loss:.4f} ({comparison.common_loss_of})"
    groups = [
        _group(comparison, trained, "Tokens a second", lambda run: run.tokens_per_second, median, speed),
        _group(comparison, trained, f"Time to loss{to_loss}", lambda run: run.seconds_to_loss, fmean, format_seconds),
        _group(comparison, trained, "Energy", _watt_hours, fmean, lambda value: f"{value:.3g} Wh"),
    ]
    return [group for group in groups if group.bars]


def _watt_hours(run: SeedResult) -> float | None:
    return run.energy_joules / 3600 if run.energy_joules else None


def _group(
    comparison: Comparison,
    arms: Sequence[ArmResult],
    name: str,
    of: Callable[[SeedResult], float | None],
    middle: Callable[[list[float]], float],
    text: Callable[[float], str],
) -> BarGroup:
    known = {arm.name: [value for run in arm.finished if (value := of(run)) is not None] for arm in arms}
    largest = max((value for values in known.values() for value in values), default=0.0)
    order = {arm.name: index for index, arm in enumerate(comparison.arms)}
    bars = []
    for arm, values in known.items():
        if values and largest:
            value = middle(values)
            seeds = tuple(_percent(one, largest) for one in values) if len(values) > 1 else ()
            part = Part(0.0, _percent(value, largest), style(order[arm]), text(value))
            bars.append(Bar(arm, (part,), text(value), seeds))
    return BarGroup(name, tuple(bars))


def _stacked(held: dict[str, int], holders: dict[str, Style], largest: int) -> tuple[Part, ...]:
    parts, left = [], 0.0
    for name, nbytes in held.items():
        if nbytes:
            width = _percent(nbytes, largest)
            parts.append(Part(round(left, 3), width, holders[name], f"{name}: {format_bytes(nbytes)}"))
            left += width
    return tuple(parts)


def _percent(value: float, largest: float) -> float:
    return round(100 * value / largest, 3)
