"""Loss curves as lines to draw: the mean over an arm's seeds, and the band from the best to the worst of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nybble.compare.report.curves import Point, shows_validation, training_curve, validation_curve
from nybble.compare.report.scale import Scale, Tick
from nybble.compare.report.styles import Style, style
from nybble.compare.result import Comparison

_MARKS = 6


class Mark(NamedTuple):
    """In percent of the picture, from its upper left."""

    x: float
    y: float


@dataclass(frozen=True)
class Line:
    """path, band: as SVG writes them, in percent of the picture. band is empty for one seed."""

    name: str
    style: Style
    path: str
    band: str
    marks: tuple[Mark, ...]
    last: str


@dataclass(frozen=True)
class Panel:
    """One picture."""

    title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


class _Drawn(NamedTuple):
    style: Style
    name: str
    curve: list[Point]


def loss_panels(comparison: Comparison) -> list[Panel]:
    """Whole runs, and their second half on an axis of its own, where arms lie closer together than the axis shows."""
    arms = [(style(n), arm) for n, arm in enumerate(comparison.arms) if arm.trainable and arm.finished]
    evaluated = [_Drawn(look, arm.name, validation_curve(arm)) for look, arm in arms]
    trained = [_Drawn(look, arm.name, training_curve(arm)) for look, arm in arms]
    if shows_validation([arm for _, arm in arms]):
        panels = [
            *_whole_and_half("Validation loss", evaluated),
            _panel("Validation loss by seconds of training", evaluated, lambda point: point.seconds),
            _panel("Training loss, running mean, by step", trained),
        ]
    else:
        panels = _whole_and_half("Training loss, running mean,", trained)
    return [panel for panel in panels if panel is not None]


def _whole_and_half(title: str, arms: Sequence[_Drawn]) -> list[Panel | None]:
    last = max((drawn.curve[-1].step for drawn in arms if drawn.curve), default=0)
    halves = [drawn._replace(curve=[point for point in drawn.curve if point.step >= last / 2]) for drawn in arms]
    return [_panel(f"{title} by step", arms), _panel(f"{title} by step, second half closer", halves)]


def _step(point: Point) -> float:
    return point.step


def _panel(title: str, arms: Sequence[_Drawn], x_of: Callable[[Point], float] = _step) -> Panel | None:
    # An evaluation may give no number, which lies nowhere on an axis.
    finite = [arm._replace(curve=[point for point in arm.curve if math.isfinite(point.mean)]) for arm in arms]
    drawn = [arm for arm in finite if len(arm.curve) > 1]
    if not drawn:
        return None
    points = [point for arm in drawn for point in arm.curve]
    x = Scale.over((x_of(point) for point in points), room=0.0)
    y = Scale.over(value for point in points for value in (point.low, point.high))
    lines = tuple(_line(arm, x, x_of, y) for arm in drawn)
    return Panel(title, lines, tuple(x.ticks()), tuple(y.ticks()))


def _line(drawn: _Drawn, x: Scale, x_of: Callable[[Point], float], y: Scale) -> Line:
    def at(point: Point, value: float) -> Mark:
        return Mark(x.percent(x_of(point)), round(100 - y.percent(value), 3))

    middle = [at(point, point.mean) for point in drawn.curve]
    upper = [at(point, point.high) for point in drawn.curve]
    lower = [at(point, point.low) for point in reversed(drawn.curve)]
    # Marks of several lines stand at different places, so that none hides another.
    shift, last = drawn.style.number % 3 / 3, len(middle) - 1
    marked = {min(last, round((n + shift) * last / _MARKS)) for n in range(_MARKS + 1)}
    band = f"{_path([*upper, *lower])}Z" if upper != middle else ""
    marks = tuple(middle[n] for n in sorted(marked))
    return Line(drawn.name, drawn.style, _path(middle), band, marks, f"{drawn.curve[-1].mean:.4f}")


def _path(marks: Sequence[Mark]) -> str:
    return "M" + "L".join(f"{mark.x:g} {mark.y:g}" for mark in marks)
