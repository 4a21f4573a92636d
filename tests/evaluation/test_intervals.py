"""Intervals hold what they promise: the truth, as often as they say."""

from __future__ import annotations

import random

import pytest

from nybble.evaluation.intervals import bootstrap_mean, bootstrap_ratio, wilson_interval


def test_the_bootstrap_covers_the_true_ratio_as_often_as_it_says() -> None:
    draw = random.Random(0)
    covered = 0
    for trial in range(300):
        counts = [draw.randint(5, 50) for _ in range(80)]
        # Rows differ in their level (1.5 on average), which a bootstrap over tokens would not see.
        totals = [count * draw.gauss(1.5, 0.4) for count in counts]
        interval = bootstrap_ratio(totals, counts, draws=500, seed=trial)
        covered += interval.low <= 1.5 <= interval.high
    assert 0.90 <= covered / 300 <= 0.98  # 0.95 +- 4 standard errors


def test_a_ratio_is_of_the_sums() -> None:
    interval = bootstrap_ratio([10.0, 1.0] * 200, [5, 1] * 200)
    assert interval.low < 11 / 6 < interval.high  # not the mean of 2 and 1
    assert interval.low > 1.7
    same = bootstrap_ratio([2.0, 4.0, 6.0], [1, 2, 3])
    assert (same.low, same.high) == pytest.approx((2.0, 2.0))
    assert "3 rows" in same.how


def test_the_seed_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [random.Random(i).random() for i in range(50)]
    first = bootstrap_mean(values)
    assert bootstrap_mean(values) == first
    assert bootstrap_mean(values, seed=1) != first
    assert bootstrap_mean(values, level=0.5).low > first.low
    monkeypatch.setattr("nybble.evaluation.intervals._DRAWN_AT_ONCE", 1000)  # in parts: of the same size and place
    assert bootstrap_mean(values).low == pytest.approx(first.low, abs=0.01)
    with pytest.raises(ValueError):
        bootstrap_mean([])


def test_wilson() -> None:
    # Brown, Cai and DasGupta (2001), and where the textbook's interval would have no width.
    assert (wilson_interval(0, 10).low, wilson_interval(0, 10).high) == pytest.approx((0, 0.2775), abs=5e-5)
    assert (wilson_interval(8, 10).low, wilson_interval(8, 10).high) == pytest.approx((0.4902, 0.9433), abs=5e-5)
    assert wilson_interval(10, 10).high == 1.0
