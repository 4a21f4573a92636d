"""Everything that is measured of one model, loaded once: the loss on rows, answers to questions, tasks of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from nybble.adapters.saved import read_adapter
from nybble.config import RunConfig
from nybble.data.example import Example
from nybble.data.prepare import DataReport
from nybble.evaluation.answers import MAX_NEW_TOKENS, Answers, answer_questions
from nybble.evaluation.ask import BATCH_SIZE
from nybble.evaluation.held_out import HeldOut, measure_held_out, prepare_held_out
from nybble.evaluation.progress import counted
from nybble.evaluation.questions import Questions, read_questions
from nybble.evaluation.tasks import Tasks, TaskScore
from nybble.inference import load_within_plan, open_for_inference
from nybble.planner.evaluation import Held, Sequences
from nybble.planner.words import describe


@dataclass(frozen=True)
class Wanted:
    """What to measure.

    rows: the loss on the settings' held-out rows. questions: a file of them, see `nybble.evaluation.questions`.
    tasks: of lm-evaluation-harness, with `few_shot` examples before each of at most `limit` questions, by the chat
    template or not. batch_size: questions at a time.
    """

    rows: bool = True
    questions: str | None = None
    max_new_tokens: int = MAX_NEW_TOKENS
    tasks: tuple[str, ...] = ()
    few_shot: int | None = None
    limit: int | None = None
    chat_template: bool = False
    batch_size: int = BATCH_SIZE


@dataclass(frozen=True)
class Evaluation:
    """What was measured; None or empty where it was not asked for. data: what became of the held-out rows."""

    held_out: HeldOut | None
    answers: Answers | None
    tasks: tuple[TaskScore, ...]
    data: DataReport | None = None

    def figures(self) -> dict[str, Any]:
        """As JSON values; those of the held-out rows stand at the top."""
        figures: dict[str, Any] = asdict(self.held_out) if self.held_out else {}
        if self.data:
            figures["data"] = asdict(self.data)
        if self.answers:
            figures["questions"] = self.answers.figures()
        if self.tasks:
            figures["tasks"] = [asdict(score) for score in self.tasks]
        return figures


def evaluate_model(
    config: RunConfig, wanted: Wanted, *, adapter: Path | None = None, progress: bool = False
) -> Evaluation:
    """Measure the model of `config`, with `adapter` if there is one; a merged model is one like any other.

    Rows, questions and tasks are read before weights are, so that a mistake in them shows at once.
    """
    tasks = Tasks.find(wanted.tasks) if wanted.tasks else None
    questions = _questions(config, wanted.questions, adapter) if wanted.questions else None
    examples, report = prepare_held_out(config.model, adapter, config.data) if wanted.rows else ([], None)
    work = _work(config, wanted, examples, questions)
    loaded, held = load_within_plan(config, adapter, work=work, progress=progress)
    if progress:
        _say(held)
    held_out = answers = None
    if wanted.rows:
        with counted("held-out rows", len(examples), progress=progress) as done:
            held_out = measure_held_out(loaded, examples, batch_size=held.batch(config.train.batch_size), done=done)
    size = held.batch(wanted.batch_size)
    if questions:
        with counted("questions", len(questions), progress=progress) as done:
            answers = answer_questions(
                loaded.model,
                loaded.tokenizer,
                questions,
                batch_size=size,
                max_new_tokens=wanted.max_new_tokens,
                done=done,
            )
    scores = (
        tasks.run(
            loaded.model,
            loaded.tokenizer,
            batch_size=size,
            few_shot=wanted.few_shot,
            limit=wanted.limit,
            chat=wanted.chat_template,
            progress=progress,
        )
        if tasks
        else ()
    )
    return Evaluation(held_out, answers, scores, report)


def _questions(config: RunConfig, path: str, adapter: Path | None) -> Questions:
    checkpoint, tokenizer = open_for_inference(config.model, read_adapter(adapter) if adapter else None)
    return read_questions(path, tokenizer, config.data, max_positions=checkpoint.max_positions)


def _work(
    config: RunConfig, wanted: Wanted, examples: Sequence[Example], questions: Questions | None
) -> list[Sequences]:
    """What goes through the model at a time. How long a task's questions are is not known before it runs."""
    work = [Sequences(config.train.batch_size, max(map(len, examples), default=0))]
    if questions:
        prompt = max((len(question.tokens) for question in questions.open), default=0)
        choices = [len(candidate) for question in questions.choice for candidate in question.candidates]
        work.append(Sequences(wanted.batch_size, prompt, kept=prompt + wanted.max_new_tokens if prompt else 0))
        work.append(Sequences(wanted.batch_size, max(choices, default=0)))
    return work


def _say(held: Held) -> None:
    """What is not as it would be on a large device."""
    how = [f"{name} {words}" for name, words in describe(held.plan).items() if name != "activations"]
    plain = not held.plan.streamed() and held.plan.embedding == held.plan.head == "device"
    lines = [*([] if plain else how), *([f"batches in {held.parts} parts"] if held.parts > 1 else [])]
    if lines:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"plan: {'; '.join(lines)}")
