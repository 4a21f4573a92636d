"""Exact learning rates."""

from __future__ import annotations

import math

import pytest

from nybble.optim.config import OptimConfig
from nybble.optim.schedule import learning_rate


def rates(total_steps: int, **settings: object) -> list[float]:
    config = OptimConfig.model_validate({"learning_rate": 1.0} | settings)
    return [learning_rate(step, total_steps, config) for step in range(1, total_steps + 1)]


def test_constant_after_a_linear_warm_up() -> None:
    assert rates(6, schedule="constant", warmup_steps=3) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_falls_to_one_step_above_its_floor() -> None:
    assert rates(4, schedule="linear", warmup_steps=0) == [1.0, 0.75, 0.5, 0.25]
    assert rates(4, schedule="linear", warmup_steps=0, min_lr_ratio=0.5) == [1.0, 0.875, 0.75, 0.625]
    assert rates(6, schedule="linear", warmup_steps=2) == [1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25]


def test_cosine_is_half_a_cosine() -> None:
    expected = [0.5, 1.0, (1 + math.cos(math.pi / 3)) / 2, (1 + math.cos(2 * math.pi / 3)) / 2]
    assert rates(4, schedule="cosine", warmup_steps=1) == pytest.approx(expected, abs=1e-15)
    with_floor = [0.2 + 0.8 * rate for rate in expected[1:]]
    assert rates(4, schedule="cosine", warmup_steps=1, min_lr_ratio=0.2)[1:] == pytest.approx(with_floor, abs=1e-15)


def test_warm_up_by_ratio_rounds_up_and_is_overridden_by_steps() -> None:
    assert rates(10, schedule="constant", warmup_ratio=0.11)[:3] == [1 / 3, 2 / 3, 1.0]
    assert rates(10, schedule="constant", warmup_ratio=0.5, warmup_steps=0)[0] == 1.0


def test_a_warm_up_longer_than_the_run_only_rises() -> None:
    assert rates(3, warmup_steps=100) == [0.25, 0.5, 0.75]


def test_a_rate_is_in_units_of_the_setting() -> None:
    assert learning_rate(2, 4, OptimConfig(learning_rate=2e-4, schedule="linear", warmup_steps=0)) == 2e-4 * 0.75
