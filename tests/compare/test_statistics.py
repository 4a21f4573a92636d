"""Intervals and verdicts, against definitions and simulations."""

from __future__ import annotations

import pytest
import torch

from nybble.compare.result import Interval
from nybble.compare.statistics import compare_losses, judge, score_over_seeds, t_interval, t_quantile


@pytest.mark.parametrize(
    ("level", "degrees", "expected"),  # of printed tables
    [
        (0.95, 1, 12.7062),
        (0.95, 2, 4.30265),
        (0.95, 4, 2.77645),
        (0.95, 9, 2.26216),
        (0.99, 4, 4.60409),
        (0.9, 3, 2.35336),
    ],
)
def test_quantiles_of_student(level: float, degrees: int, expected: float) -> None:
    assert t_quantile(level, degrees) == pytest.approx(expected, abs=5e-5)


def test_the_interval_over_seeds_holds_the_mean_as_often_as_it_says() -> None:
    samples = torch.randn(2000, 5, dtype=torch.float64).mul_(3).add_(1)
    inside = sum(found.low < 1 < found.high for found in (t_interval(row) for row in samples.tolist()))
    # 0.95 +- 4 standard deviations of a share of 2,000
    assert abs(inside / 2000 - 0.95) < 4 * (0.95 * 0.05 / 2000) ** 0.5


def losses(seed_effects: list[float], difference: float, rows: int = 300) -> tuple[dict, dict, list[int]]:
    """By seed: what rows share is large, what sets the arms apart is small."""
    tokens = torch.randint(5, 50, (rows,))
    hard = tokens * (2 + torch.randn(rows))
    reference = {seed: (hard + tokens * effect).tolist() for seed, effect in enumerate(seed_effects)}
    noise = {seed: 0.05 * torch.randn(rows) for seed in reference}
    arm = {s: (torch.tensor(row) + tokens * difference + tokens * noise[s]).tolist() for s, row in reference.items()}
    return arm, reference, tokens.tolist()


def test_differences_are_paired() -> None:
    arm, reference, tokens = losses([0.0, 0.3, -0.4], 0.02)
    found = compare_losses(("arm", arm), ("reference", reference), tokens, margin=0.05)
    assert found is not None
    assert found.seeds == (0, 1, 2)
    assert found.mean == pytest.approx(0.02, abs=0.01)
    # Seeds differ by 0.3 nats and rows by 1: unpaired, the interval would be dozens of times as wide.
    assert found.interval.high - found.interval.low < 0.05
    assert found.over_rows.high - found.over_rows.low < 0.02
    assert found.verdict == "not worse"


def test_the_difference_is_a_token_weighted_one() -> None:
    found = compare_losses(("a", {0: [3.0, 10.0]}), ("b", {0: [2.0, 4.0]}), [1, 9], margin=0.0)
    assert found is not None
    assert found.mean == found.by_seed[0] == pytest.approx(7 / 10)
    assert found.interval == found.over_rows  # of one seed, rows are all that can vary


def test_only_seeds_that_both_finished_count() -> None:
    arm, reference, tokens = losses([0.0, 0.3], 0.1)
    del reference[0]
    found = compare_losses(("arm", arm), ("reference", reference), tokens, margin=0.0)
    assert found is not None
    assert found.seeds == (1,)
    assert compare_losses(("arm", arm), ("reference", {}), tokens, margin=0.0) is None


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.2, -0.1, "better"),
        (-0.1, 0.01, "not worse"),
        (-0.1, 0.02, "inconclusive"),
        (0.005, 0.02, "inconclusive"),
        (0.011, 0.02, "worse"),
    ],
)
def test_verdicts(low: float, high: float, verdict: str) -> None:
    assert judge(Interval(low, high, 0.95, ""), margin=0.01) == verdict


def test_scores_vary_over_seeds_or_else_over_questions_and_stay_between_0_and_1() -> None:
    one = score_over_seeds("exact match", [[1.0, 0.0, 1.0, 1.0]])
    assert (one.value, one.questions, one.interval.how) == (0.75, 4, "Wilson's interval over 4 questions")
    several = score_over_seeds("ROUGE-L", [[0.25, 0.5], [0.5, 0.75], [0.25, 0.75]])
    expected = t_interval([0.375, 0.625, 0.5])
    assert (several.value, several.questions, several.interval) == (0.5, 2, expected)
    agreeing = score_over_seeds("exact match", [[0.0] * 9, [0.0] * 9])
    assert agreeing.interval.how == "Wilson's interval over 9 questions"
    assert agreeing.interval.high > 0.2
    wide = score_over_seeds("ROUGE-L", [[0.5], [1.0]]).interval
    assert (wide.low, wide.high) == (0.0, 1.0)
