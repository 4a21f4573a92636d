"""Bars and intervals lie where their values say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nybble.compare.report.bars import memory_bars, speed_bars
from nybble.compare.report.intervals import difference_intervals
from tests.compare.report.sample import MIB, comparison

ENDS = {"base": 2.8, "lora": 1.55, "qlora": 1.59, "full": 1.545}


def test_memory_bars_are_as_long_as_their_bytes_and_predictions_stand_below() -> None:
    bars = memory_bars(comparison(ENDS))
    assert bars is not None
    assert bars.where == "device"
    full = bars.groups[-1]
    assert full.name == "full"
    assert [(bar.name, bar.expected) for bar in full.bars] == [
        ("load", False),
        ("predicted", True),
        ("train", False),
        ("predicted", True),
        ("evaluate", False),
    ]
    assert full.bars[2].parts[0].width == 100.0  # the largest peak of all
    assert full.bars[0].parts[0].width == pytest.approx(100 * 270 / 2900, abs=1e-3)
    left = 0.0
    for part, mib in zip(full.bars[3].parts, (90, 19, 38, 900, 60), strict=True):
        assert part.left == pytest.approx(left, abs=2e-3)
        assert part.width == pytest.approx(100 * mib / 2900, abs=1e-3)
        left += part.width
    assert [name for name, _ in bars.holders] == ["weights", "scratch", "adapters", "moments", "activations", "logits"]
    assert len({style.hatch for _, style in bars.holders}) == 6


def test_without_a_device_the_host_is_shown_and_nothing_predicted() -> None:
    bars = memory_bars(comparison(ENDS, device=False))
    assert bars is not None
    assert (bars.where, bars.holders) == ("host", ())
    assert bars.groups[0].bars[-1].text == "1.22 GiB"


def test_what_was_not_measured_has_no_bars() -> None:
    found = comparison(ENDS)
    nothing = tuple(replace(arm, runs=()) for arm in found.arms)
    assert memory_bars(replace(found, arms=nothing)) is None
    assert speed_bars(replace(found, arms=nothing)) == []
    assert [group.name for group in speed_bars(comparison(ENDS, device=False))] == ["Tokens a second"]


def test_speeds_are_medians_with_every_seed_marked() -> None:
    found = comparison(ENDS)
    speed, to_loss, energy = speed_bars(found)
    assert (to_loss.name, energy.name) == ("Time to loss 1.6200 (validation)", "Energy")
    assert [bar.name for bar in speed.bars] == ["lora", "qlora", "full"]
    largest = max(run.tokens_per_second or 0 for arm in found.arms for run in arm.runs)
    for bar in speed.bars:
        own = [run.tokens_per_second or 0 for run in found.arm(bar.name).runs]
        assert bar.seeds == pytest.approx([100 * value / largest for value in own], abs=1e-3)
        assert bar.parts[0].width == pytest.approx(100 * sorted(own)[2] / largest, abs=1e-3)


def test_intervals_share_one_axis_with_zero_and_margin() -> None:
    found = comparison(ENDS)
    shown = difference_intervals(found)
    assert shown is not None
    per_nat = (shown.margin - shown.zero) / 0.01
    for row, one in zip(shown.rows, found.differences, strict=True):
        for percent, value in ((row.low, one.interval.low), (row.mean, one.mean), (row.high, one.interval.high)):
            assert percent == pytest.approx(shown.zero + per_nat * value, abs=0.02)
            assert 0 < percent < 100
        assert len(row.seeds) == 5
    assert [row.verdict for row in shown.rows] == [one.verdict for one in found.differences]
    assert difference_intervals(replace(found, differences=())) is None


def test_a_size_of_nothing_is_no_part() -> None:
    found = comparison({"lora": 1.55})
    (lora,) = found.arms
    lora = replace(lora, predicted_bytes={"step": {"weights": 5 * MIB, "moments": 0}})
    bars = memory_bars(replace(found, arms=(lora,)))
    assert bars is not None
    assert [name for name, _ in bars.holders] == ["weights"]
