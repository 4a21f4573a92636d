"""Any task that lm-evaluation-harness knows, on a model that is loaded here. The harness itself is an extra."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nybble.errors import UserError, did_you_mean
from nybble.evaluation.intervals import LEVEL, Interval

PACKAGE = "lm_eval"


@dataclass(frozen=True)
class TaskScore:
    """One figure of one task, as the harness names and counts it. standard_error: None where it knows none."""

    task: str
    metric: str
    value: float
    standard_error: float | None
    questions: int

    @property
    def interval(self) -> Interval | None:
        """By the standard error; None where that is not known or 0, as where all questions scored alike."""
        if not self.standard_error:
            return None
        half = NormalDist().inv_cdf((1 + LEVEL) / 2) * self.standard_error
        return Interval(self.value - half, self.value + half, LEVEL, "the harness's standard error")


@dataclass(frozen=True)
class Tasks:
    """Tasks that are there, with their data. names: of tasks, groups of tasks, or YAML files that describe one."""

    names: tuple[str, ...]
    manager: Any

    @classmethod
    def find(cls, names: Sequence[str]) -> Tasks:
        """Raises UserError where the harness is not installed, and for a task that it does not know or cannot load."""
        if importlib.util.find_spec(PACKAGE) is None:
            raise UserError(
                "needs the package lm-eval to run its tasks", where="--tasks", fix="Run: pip install 'nybble[eval]'"
            )
        from lm_eval.tasks import TaskManager

        manager = TaskManager()
        for name in names:
            if name not in manager.all_tasks and not name.endswith((".yaml", ".yml")):
                guess = did_you_mean(name, manager.all_tasks)
                fix = f"Did you mean {guess!r}?" if guess else "`lm-eval ls tasks` lists those that there are."
                raise UserError(f"lm-evaluation-harness has no task {name!r}", where="--tasks", fix=fix)
        try:
            manager.load(list(names))
        # Tasks are files and programs of others, and fetch their data from the hub.
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            fix = "Check the spelling, and whether the hub that has its data can be reached."
            raise UserError(f"cannot be loaded: {reason}", where=f"--tasks {','.join(names)}", fix=fix) from error
        return cls(tuple(names), manager)

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        few_shot: int | None = None,
        limit: int | None = None,
        chat: bool = False,
        progress: bool = False,
    ) -> tuple[TaskScore, ...]:
        """few_shot: examples before each question, None: the task's own. limit: questions a task. chat: by template."""
        from lm_eval import simple_evaluate

        from nybble.evaluation.harness import HarnessModel

        found = simple_evaluate(
            HarnessModel(model, tokenizer, batch_size=batch_size, progress=progress),
            tasks=list(self.names),
            task_manager=self.manager,
            num_fewshot=few_shot,
            limit=limit,
            apply_chat_template=chat,
            log_samples=False,
            bootstrap_iters=1000,
        )
        counts = found.get("n-samples", {})
        return tuple(
            score
            for task, figures in found["results"].items()
            for score in _scores(task, figures, int(counts.get(task, {}).get("effective", 0)))
        )


def _scores(task: str, figures: dict[str, Any], questions: int) -> list[TaskScore]:
    """The harness's figures are named `metric,filter`, and their errors `metric_stderr,filter`.

    questions: of a task. A group has none of its own, but counts for each figure those of the tasks that have it.
    """
    counts, scores = figures.get("sample_count", {}), []
    for name, value in figures.items():
        metric, separator, answer_filter = name.partition(",")
        if not separator or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = figures.get(f"{metric}_stderr,{answer_filter}")
        shown = metric if answer_filter == "none" else f"{metric} ({answer_filter})"
        known = float(error) if isinstance(error, int | float) else None
        scores.append(TaskScore(task, shown, float(value), known, int(counts.get(name, questions))))
    return scores
