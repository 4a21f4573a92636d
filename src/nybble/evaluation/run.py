"""Everything that is measured of one model, loaded once: the loss on rows, answers to questions, tasks of others."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nybble.adapters.saved import read_adapter
from nybble.config import RunConfig
from nybble.evaluation.answers import MAX_NEW_TOKENS, Answers, answer_questions
from nybble.evaluation.ask import BATCH_SIZE
from nybble.evaluation.held_out import HeldOut, held_out_examples, measure_held_out
from nybble.evaluation.progress import counted
from nybble.evaluation.questions import Questions, read_questions
from nybble.evaluation.tasks import Tasks, TaskScore
from nybble.inference import load_for_inference, open_for_inference


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
    """What was measured; None or empty where it was not asked for."""

    held_out: HeldOut | None
    answers: Answers | None
    tasks: tuple[TaskScore, ...]

    def figures(self) -> dict[str, Any]:
        """As JSON values; those of the held-out rows stand at the top."""
        figures: dict[str, Any] = asdict(self.held_out) if self.held_out else {}
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
    examples = held_out_examples(config.model, adapter, config.data) if wanted.rows else []
    loaded = load_for_inference(config.model, adapter, progress=progress)
    held_out = answers = None
    if wanted.rows:
        with counted("held-out rows", len(examples), progress=progress) as done:
            held_out = measure_held_out(loaded, examples, batch_size=config.train.batch_size, done=done)
    size = wanted.batch_size
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
    return Evaluation(held_out, answers, scores)


def _questions(config: RunConfig, path: str, adapter: Path | None) -> Questions:
    checkpoint, tokenizer = open_for_inference(config.model, read_adapter(adapter) if adapter else None)
    return read_questions(path, tokenizer, config.data, max_positions=checkpoint.max_positions)
