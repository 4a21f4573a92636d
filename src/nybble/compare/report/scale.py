"""Axes: where a value lies between two ends, and round numbers to write beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


class Tick(NamedTuple):
    """percent: of the axis, from its low end."""

    percent: float
    text: str


@dataclass(frozen=True)
class Scale:
    """The values at the two ends of an axis, of which `high` is the larger."""

    low: float
    high: float

    @classmethod
    def over(cls, values: Iterable[float], *, room: float = 0.04) -> Scale:
        """From the least of the values to the largest, with some room; values that are all the same get an axis too."""
        known = list(values)
        low, high = min(known), max(known)
        span = high - low
        return cls(low - room * span, high + room * span) if span else cls(low - 0.5, high + 0.5)

    def percent(self, value: float) -> float:
        """0 at the low end, 100 at the high one; to a thousandth, which no screen shows."""
        return round(100 * (value - self.low) / (self.high - self.low), 3)

    def ticks(self, most: int = 6) -> list[Tick]:
        """At round numbers within the axis, `most` of them or fewer."""
        step = _round_step((self.high - self.low) / most)
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [Tick(self.percent(n * step), f"{n * step:,.{decimals}f}") for n in range(first, last + 1)]


def _round_step(least: float) -> float:
    """The least of 1, 2, 5, 10, 20, ... (times a power of ten) that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
