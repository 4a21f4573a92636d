"""How close a given answer comes to an expected one, from 0 to 1."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from nybble.evaluation.intervals import Interval, bootstrap_mean, wilson_interval

EXACT_MATCH, ROUGE_L = "exact match", "ROUGE-L"

_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Score:
    """The mean of one score over the questions that have it, from 0 to 1. Higher is better."""

    name: str
    value: float
    interval: Interval
    questions: int

    @classmethod
    def over_questions(cls, name: str, values: Sequence[float]) -> Score:
        """values: of each question. The interval is for other questions of their kind."""
        right = sum(values)
        all_or_nothing = all(value in (0.0, 1.0) for value in values)
        interval = wilson_interval(int(right), len(values)) if all_or_nothing else bootstrap_mean(values)
        return cls(name, right / len(values), interval, len(values))

    @property
    def telling_interval(self) -> Interval | None:
        """None where it says nothing of other questions: over one alone, or without width, as all gave the same."""
        return self.interval if self.questions > 1 and self.interval.low < self.interval.high else None


def answer_scores(given: str, expected: Sequence[str]) -> dict[str, float]:
    """All scores of an answer in the model's own words, by name."""
    return {EXACT_MATCH: exact_match(given, expected), ROUGE_L: rouge_l(given, expected)}


def exact_match(given: str, expected: Sequence[str]) -> float:
    """1 if `given` is one of the expected answers, white space and composed characters aside; letter case counts."""
    return float(_plain(given) in map(_plain, expected))


def rouge_l(given: str, expected: Sequence[str]) -> float:
    """ROUGE-L's F1 (Lin, 2004) against the expected answer that comes closest: words in the same order, lower case.

    As the package rouge-score counts without stemming; words may have letters of any alphabet.
    """
    return max(_rouge_l(_words(given), _words(answer)) for answer in expected)


def _rouge_l(given: list[str], expected: list[str]) -> float:
    shared = _longest_common_subsequence(given, expected)
    return 2 * shared / (len(given) + len(expected)) if shared else 0.0  # 2PR / (P + R)


def _longest_common_subsequence(one: list[str], other: list[str]) -> int:
    """Its length, a row of the table at a time as the bits of one number (Hyyrö, 2004)."""
    where: dict[str, int] = {}
    for position, word in enumerate(one):
        where[word] = where.get(word, 0) | 1 << position
    everywhere = row = (1 << len(one)) - 1
    for word in other:
        matched = row & where.get(word, 0)
        row = ((row + matched) | (row - matched)) & everywhere
    return len(one) - row.bit_count()


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())
