"""The task with exact answers: they are right, and held-out questions are never trained on."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from nybble.demo.splits import Row
from nybble.demo.word_tasks import KINDS, ORDINALS, in_words, word_tasks


def said(row: Row) -> tuple[str, str]:
    question, answer = row["messages"]
    return question["content"], answer["content"]


def solve(kind: str, question: str) -> str:
    """The answer, found from the question's words alone."""
    head, _, tail = question.rstrip(".?").partition(": ")
    items = tail.split(", ")
    numbers = {in_words(number): number for number in range(200)}
    match kind:
        case "sort":
            return ", ".join(sorted(items))
        case "reverse":
            return ", ".join(reversed(items))
        case "pick":
            return items[ORDINALS.index(re.search(r"the (\w+) word", head)[1])]
        case "leave out":
            return ", ".join(item for item in items if item != re.search(r"out (\w+) from", head)[1])
        case "count":
            return in_words(sum(item.startswith(head[-1]) for item in items))
        case "largest":
            return str(max(map(int, items)))
    one, sign, other = re.fullmatch(r"What is ([\w-]+) (plus|minus) ([\w-]+)", head).groups()
    return in_words(numbers[one] + (numbers[other] if sign == "plus" else -numbers[other]))


def test_every_answer_is_right() -> None:
    splits = word_tasks(800, 80, 80, seed=3)
    rows = splits.train + splits.validation + splits.test
    wrong = [said(row) for row in rows if solve(row["kind"], said(row)[0]) != said(row)[1]]
    assert not wrong
    assert Counter(row["kind"] for row in splits.test) == dict.fromkeys(KINDS, 10)


def test_no_question_is_in_two_splits() -> None:
    splits = word_tasks(4000, 300, 300)
    questions = [said(row)[0] for rows in (splits.train, splits.validation, splits.test) for row in rows]
    assert len(questions) == len(set(questions)) == 4600


def test_the_seed_decides() -> None:
    splits = word_tasks(64, 16, 16, seed=5)
    assert word_tasks(64, 16, 16, seed=5) == splits
    assert word_tasks(64, 16, 16, seed=6).train != splits.train
    more = word_tasks(640, 16, 16, seed=5)
    assert (more.test, more.validation) == (splits.test, splits.validation)
    assert more.train[:64] == splits.train


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (42, "forty-two"),
        (100, "one hundred"),
        (198, "one hundred and ninety-eight"),
    ],
)
def test_numbers_in_words(number: int, words: str) -> None:
    assert in_words(number) == words
