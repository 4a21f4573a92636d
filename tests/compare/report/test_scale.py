"""Axes have round numbers at the places where those values lie."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from nybble.compare.report.scale import Scale


@pytest.mark.parametrize("seed", range(20))
def test_ticks_are_round_few_and_where_their_values_lie(seed: int) -> None:
    rng = random.Random(seed)
    low = rng.uniform(-10, 10) * 10 ** rng.randint(-3, 5)
    axis = Scale(low, low + rng.uniform(0.1, 10) * 10 ** rng.randint(-3, 5))
    ticks = axis.ticks(most=6)
    assert 1 <= len(ticks) <= 7
    for tick in ticks:
        value = float(tick.text.replace(",", ""))
        assert axis.low - 1e-9 * abs(axis.low) <= value <= axis.high + 1e-9 * abs(axis.high)
        assert tick.percent == pytest.approx(100 * (value - axis.low) / (axis.high - axis.low), abs=2e-3)
    values = [float(tick.text.replace(",", "")) for tick in ticks]
    for before, after in pairwise(values):
        assert f"{after - before:.0e}"[0] in "125"


def test_an_axis_over_values_has_room_at_both_ends_and_one_value_has_an_axis_too() -> None:
    axis = Scale.over([2.0, 4.0, 3.0], room=0.1)
    assert (axis.low, axis.high) == pytest.approx((1.8, 4.2))
    assert Scale.over([3.0, 3.0], room=0.0).percent(3.0) == 50.0


def test_ticks_of_small_steps_keep_their_decimals() -> None:
    assert [tick.text for tick in Scale(0.0, 0.04).ticks(most=4)] == ["0.00", "0.01", "0.02", "0.03", "0.04"]
