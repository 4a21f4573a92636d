"""Scores of answers against their definitions, and ROUGE-L against values of the package rouge-score 0.1.2."""

from __future__ import annotations

import random
from functools import cache

import pytest

from nybble.evaluation.scores import exact_match, rouge_l


def test_exact_match() -> None:
    assert exact_match("  the\n answer ", ["other", "the answer"]) == 1.0
    assert exact_match("The answer", ["the answer"]) == 0.0
    assert exact_match("the answer.", ["the answer"]) == 0.0
    assert exact_match("caf\u0065\u0301", ["caf\u00e9"]) == 1.0


@pytest.mark.parametrize(
    ("given", "expected", "value"),
    [
        ("Return the sum of its parts.", "Returns the sum of all the parts (x_1 + 2).", 0.5),
        ("Don't do it, ever!", "do not ever do it", 0.4),
        ("the quick brown fox", "the brown quick fox jumps", 2 * 3 / 9),
        ("Same, words: here!", "same words here", 1.0),
        ("nothing alike", "other text", 0.0),
        ("", "text", 0.0),
    ],
)
def test_rouge_l(given: str, expected: str, value: float) -> None:
    assert rouge_l(given, [expected]) == pytest.approx(value)
    assert rouge_l(given, ["zzz", expected]) == pytest.approx(value)


def test_rouge_l_counts_the_longest_common_subsequence() -> None:
    draw = random.Random(0)
    for _ in range(200):
        one, other = ([draw.choice("abcdé") for _ in range(draw.randint(1, 90))] for _ in range(2))

        @cache
        def shared(i: int, j: int, one: tuple[str, ...] = tuple(one), other: tuple[str, ...] = tuple(other)) -> int:
            if i == 0 or j == 0:
                return 0
            if one[i - 1] == other[j - 1]:
                return shared(i - 1, j - 1) + 1
            return max(shared(i - 1, j), shared(i, j - 1))

        expected = 2 * shared(len(one), len(other)) / (len(one) + len(other))
        assert rouge_l(" ".join(one), [" ".join(other)]) == pytest.approx(expected)
