"""What is told of figures, and of how few they are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nybble.evaluation.answers import Answer, Answers
from nybble.evaluation.held_out import HeldOut
from nybble.evaluation.intervals import Interval
from nybble.evaluation.report import describe
from nybble.evaluation.run import Evaluation
from nybble.evaluation.tasks import TaskScore


def of_answers(*values: float) -> Evaluation:
    answers = tuple(Answer("", "", (), "", {"ROUGE-L": value}) for value in values)
    return Evaluation(None, Answers(answers, 0, 0.0), ())


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ((0.5,), "ROUGE-L 0.500, 1 question"),
        ((1.0,), "ROUGE-L 1.000, 1 question"),
        ((0.5, 0.5), "ROUGE-L 0.500, 2 questions"),
        ((0.25, 0.75), "ROUGE-L 0.500 (95% interval 0.250 to 0.750), 2 questions"),
    ],
)
def test_an_interval_is_told_where_it_says_something(values: tuple[float, ...], line: str) -> None:
    assert list(describe(of_answers(*values))) == [line]


def test_one_row_has_no_interval() -> None:
    interval = Interval(2.0, 3.0, 0.95, "bootstrap over 2 rows")
    found = HeldOut(2.5, interval, 12.2, interval, 2, 20, 9.0, "bf16", 1, 1, 1, 1, 1)
    one = replace(found, rows=1)
    lines = list(describe(Evaluation(found, None, ())))
    assert lines[0] == "held-out loss 2.5000 nats a token (95% interval 2.0000 to 3.0000)"
    assert lines[2].startswith("2 rows, ")
    lines = list(describe(Evaluation(one, None, (TaskScore("arc", "acc", 1.0, None, 1),))))
    assert lines[:2] == ["held-out loss 2.5000 nats a token", "perplexity 12.20"]
    assert lines[2].startswith("1 row, ")
    assert lines[3] == "arc acc 1.0000, 1 question"


def test_a_task_has_an_interval_by_its_standard_error() -> None:
    tasks = (TaskScore("arc", "acc", 0.5, 0.1, 25), TaskScore("arc", "acc", 1.0, 0.0, 25))
    lines = list(describe(Evaluation(None, None, tasks)))
    assert lines == ["arc acc 0.5000 (95% interval 0.3040 to 0.6960), 25 questions", "arc acc 1.0000, 25 questions"]
