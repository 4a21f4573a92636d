"""What a run shows while it runs: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from nybble.train.loop import StepResult
from nybble.train.state import Evaluation
from nybble.units import format_bytes, format_count, format_seconds

# Where there is no terminal to rewrite a line in: the first steps, then one line every so many seconds.
_FIRST_STEPS = 3
_SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress:
    """Shows the steps and evaluations of a run on `console`, from `first_step` to `total_steps`; use it in a `with`."""

    def __init__(self, total_steps: int, *, console: Console, first_step: int = 0) -> None:
        self.console = console
        self.total_steps = total_steps
        self.first_step = first_step
        self.live = self._live_line() if console.is_terminal and not console.quiet else None
        self._task = self.live.add_task("", total=total_steps, completed=first_step) if self.live else None
        self._durations: list[float] = []
        self._shown = -_SECONDS_BETWEEN_LINES

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()

    def step(self, result: StepResult) -> None:
        if result.note:
            self.say(result.note)
        self._durations.append(result.seconds)
        text = self._describe(result)
        if self.live and self._task is not None:
            self.live.update(self._task, completed=result.step, description=text)
        elif self._is_due(result.step):
            self._shown = time.monotonic()
            self.console.print(f"step {result.step}/{self.total_steps}  {text}", highlight=False, soft_wrap=True)

    def evaluation(self, evaluation: Evaluation) -> None:
        self.say(f"step {evaluation.step}/{self.total_steps}  held-out loss {evaluation.loss:.4f}")

    def say(self, text: str) -> None:
        """Print a line above the live one."""
        (self.live.console if self.live else self.console).print(text, highlight=False, soft_wrap=True, markup=False)

    def _is_due(self, step: int) -> bool:
        early_or_last = step - self.first_step <= _FIRST_STEPS or step == self.total_steps
        return early_or_last or time.monotonic() - self._shown >= _SECONDS_BETWEEN_LINES

    def _describe(self, result: StepResult) -> str:
        recent = sorted(self._durations[-20:])
        left = (self.total_steps - result.step) * recent[len(recent) // 2]
        parts = [
            f"loss {result.loss:.4f}",
            f"lr {result.lr:.2e}",
            f"grad norm {result.grad_norm:.3g}",
            f"{format_count(result.tokens / result.seconds)} tok/s",
            f"peak {format_bytes(result.peak_bytes)}",
            f"{format_seconds(left)} left",
        ]
        return "  ".join([*parts, "skipped: fp16 overflow"] if result.skipped else parts)

    def _live_line(self) -> Progress:
        # In 80 columns the text takes two lines, rather than the place of the bar.
        text = TextColumn("{task.description}", table_column=Column(no_wrap=False))
        columns = (MofNCompleteColumn(table_column=Column(no_wrap=True)), BarColumn(bar_width=20), text)
        return Progress(*columns, console=self.console)
