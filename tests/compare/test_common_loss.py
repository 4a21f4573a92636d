"""How long runs take to a loss that all of them reach."""

from __future__ import annotations

import pytest

from nybble.compare.common_loss import common_loss, seconds_to
from nybble.compare.result import Curve


def curve(losses: list[float], *, every: float = 1.0, validation: dict[int, float] | None = None) -> Curve:
    steps = tuple(range(1, len(losses) + 1))
    seconds = tuple(every * step for step in steps)
    held_out = validation or {}
    return Curve(steps, tuple(losses), steps, seconds, tuple(held_out), tuple(held_out.values()))


def test_the_loss_is_the_lowest_that_all_reached() -> None:
    one = curve([5.0] * 4, validation={0: 4.0, 1: 3.0, 2: 2.0, 4: 1.0})
    two = curve([5.0] * 4, every=2.0, validation={0: 4.0, 1: 3.5, 2: 2.5, 4: 1.5})
    assert common_loss([one, two, Curve()]) == (1.5, "validation")
    assert seconds_to(one, 1.5, "validation") == pytest.approx(3.0)  # halfway between steps 2 and 4
    assert seconds_to(two, 1.5, "validation") == pytest.approx(8.0)
    assert seconds_to(one, 0.5, "validation") is None
    assert seconds_to(one, 5.0, "validation") == 0.0


def test_without_evaluations_it_is_the_running_mean_of_the_training_loss() -> None:
    falling = curve([float(20 - step) for step in range(20)])
    loss, of = common_loss([falling, curve([10.0] * 20)])
    assert (loss, of) == (10.0, "training")
    # Its means of 10 are 15.5, 14.5, ... from step 10 on: 10 lies between those of steps 15 and 16.
    assert seconds_to(falling, 10.0, "training") == pytest.approx(15.5)
    assert common_loss([Curve()]) == (None, None)
    assert seconds_to(Curve(), 1.0, "training") is None
