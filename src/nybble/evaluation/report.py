"""What was measured of a model, as lines and as a file of answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from nybble.data.prepare import DataReport
from nybble.evaluation.answers import Answers
from nybble.evaluation.held_out import HeldOut
from nybble.evaluation.intervals import Interval
from nybble.evaluation.run import Evaluation
from nybble.files import write_rows
from nybble.units import plural


def describe(found: Evaluation) -> Iterator[str]:
    """A line for each figure, with its interval."""
    if found.held_out:
        yield from _describe_rows(found.held_out)
    if found.data and found.data.truncated:
        yield _describe_cuts(found.data)
    if found.answers:
        yield from _describe_answers(found.answers)
    for score in found.tasks:
        shown = _shown(score.interval, 4)
        yield f"{score.task} {score.metric} {score.value:.4f}{shown}, {plural(score.questions, 'question')}"


def write_answers(path: Path, answers: Answers) -> None:
    """One answer a line, with its question and its scores."""
    write_rows(path, map(asdict, answers.answers))


def _describe_rows(found: HeldOut) -> Iterator[str]:
    several = found.rows > 1  # one row tells nothing of others
    yield f"held-out loss {found.loss:.4f} nats a token{_shown(found.loss_interval if several else None, 4)}"
    yield f"perplexity {found.perplexity:.2f}{_shown(found.perplexity_interval if several else None, 2)}"
    yield (
        f"{plural(found.rows, 'row')}, {found.target_tokens} target tokens, {found.tokens_per_second:.0f} a second, "
        f"weights held in {found.storage}"
    )


def _describe_cuts(report: DataReport) -> str:
    """What the loss leaves out: it is not that of the rows as they stand in their file."""
    samples = "" if report.samples == report.rows else f" in {plural(report.samples, 'sample')}"
    return (
        f"note: of {plural(report.rows, 'row')}{samples}, {report.truncated} cut to data.max_length, "
        f"{report.dropped} of these left out, with no answer within it"
    )


def _describe_answers(found: Answers) -> Iterator[str]:
    for score in found.scores:
        questions = plural(score.questions, "question")
        yield f"{score.name} {score.value:.3f}{_shown(score.telling_interval, 3)}, {questions}"
    if found.generated_tokens:
        yield f"{found.generated_tokens} tokens of answers in {found.seconds:.1f} s"


def _shown(interval: Interval | None, digits: int) -> str:
    if interval is None:
        return ""
    return f" ({interval.level:.0%} interval {interval.low:.{digits}f} to {interval.high:.{digits}f})"
