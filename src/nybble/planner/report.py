"""What `nybble plan` shows: whether a run fits, how, what holds the memory, how fast it is, and what else there is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.constrain import Constrain
from rich.table import Table
from rich.text import Text

from nybble.planner.advice import Advice, Option
from nybble.planner.bars import breakdown, peaks
from nybble.planner.cards import DeviceSpec
from nybble.planner.figures import prediction_figures, solution_figures
from nybble.planner.solve import Solution
from nybble.planner.words import PHASES, describe, duration, figures, in_one_line, significant, speed
from nybble.units import format_bytes

_WIDTH = 110
_METHODS = {"lora": "LoRA", "qlora": "QLoRA", "full": "full fine-tuning"}


@dataclass(frozen=True)
class Report:
    """A plan with all that there is to say about it. model: its name. split: of a step, if another is faster."""

    model: str
    trained: int
    total: int
    card: DeviceSpec
    solution: Solution
    advice: Advice | None = None
    split: Solution | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        parts = [self._head(), self._verdict(), *self._memory(), self._time(), self._advice()]
        for number, part in enumerate(part for part in parts if part is not None):
            yield Constrain(Group(Text(), part) if number else part, _WIDTH)

    def figures(self) -> dict[str, Any]:
        """As JSON values."""
        run, advice, split = self.solution.run, self.advice, self.split
        return {
            "model": self.model,
            "method": run.method,
            "parameters": {"trainable": self.trained, "total": self.total},
            "card": self.card.name,
            "batch_size": run.batch,
            "seq_len": run.seq_len,
            "gradient_accumulation": run.accumulation,
            **solution_figures(self.solution),
            "split": split and {"batch_size": split.run.batch, **solution_figures(split)},
            "advice": advice and _advice_figures(advice),
        }

    def _head(self) -> RenderableType:
        run, budget = self.solution.run, format_bytes(self.solution.budget_bytes)
        times = f"{run.accumulation} x {run.batch}" if run.accumulation > 1 else f"{run.batch}"
        share = f", 1 in {self.total / self.trained:,.0f}" if 0 < self.trained < self.total else ""
        return Group(
            Text.assemble((self.model, "bold"), f", {_METHODS[run.method]} on {self.card.name} with {budget}"),
            Text(f"{self.trained:,} of {self.total:,} parameters train{share}"),
            Text(f"{times} x {run.seq_len:,} tokens a step"),
        )

    def _verdict(self) -> RenderableType:
        solution, prediction = self.solution, self.solution.prediction
        needs = f"{format_bytes(prediction.peak_bytes)} of {format_bytes(solution.budget_bytes)}"
        there = "" if solution.fits else f" of {format_bytes(solution.host_bytes)}"
        host = f", and {format_bytes(prediction.host_bytes)}{there} of host memory" if prediction.host_bytes else ""
        if solution.fits:
            title = Text.assemble(("It fits", "bold green"), f": {needs}{host}. {speed(prediction)}.")
        else:
            title = Text.assemble(("It does not fit", "bold red"), f": {needs}{host}, held in the leanest way.")
        lines: list[RenderableType] = [title, _table_of(describe(prediction.plan))]
        if change := solution.change:
            costs = f" ({figures(change.prediction)})"
            lines.append(Text.assemble("The smallest change that fits: ", (change.settings, "bold"), costs))
        return Group(*lines)

    def _memory(self) -> list[RenderableType]:
        prediction, budget_bytes = self.solution.prediction, self.solution.budget_bytes
        name = prediction.peak_phase
        held = Text(f"GiB on the device at the peak of {PHASES.get(name, name)}", style="bold")
        return [
            Group(held, breakdown(prediction.phases[name].device, budget_bytes)),
            Group(
                Text("GiB on the device at the peak of each phase", style="bold"),
                peaks(prediction.phases, budget_bytes),
            ),
        ]

    def _time(self) -> RenderableType:
        time = self.solution.prediction.time
        copies = f", {duration(time.copies_s)} of copies beside them" if time.copies_s else ""
        kernels = f"{duration(time.compute_s)} of kernels{copies}"
        lines = [Text(f"A step takes {duration(time.seconds)}, bound by {time.bound}: {kernels}.")]
        if faster := self.solution.faster:
            lines.append(Text(f"The next faster plan needs {figures(faster)}: {in_one_line(faster.plan)}"))
        split, change = self.split, self.solution.change
        settings = split and f"train.batch_size={split.run.batch} train.gradient_accumulation={split.run.accumulation}"
        if split and not (change and change.settings == settings):  # else it has been said
            lines.append(Text(f"The same step in other micro-batches: {figures(split.prediction)} with {settings}"))
        return Group(*lines)

    def _advice(self) -> RenderableType | None:
        if self.advice is None:
            return None
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
        table.add_column("  ")
        for name in ("on this card", "host", "tokens/s", "to be fastest", "at the least"):
            table.add_column(name, justify="right", no_wrap=True)
        for method, option in self.advice.options.items():
            table.add_row(*_option_row(method, option), style="bold" if method == self.advice.method else "")
        chosen = _METHODS[self.advice.method]
        return Group(
            Text("LoRA or QLoRA", style="bold"),
            table,
            Text.assemble((f"Take {chosen}", "bold"), f": {self.advice.why}."),
        )


def _table_of(lines: Mapping[str, str]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, value in lines.items():
        table.add_row(f"  {name}", value)
    return table


def _option_row(method: str, option: Option) -> tuple[str, ...]:
    here = option.here
    needs = format_bytes(here.prediction.peak_bytes) if here.fits else "does not fit"
    tokens = significant(here.prediction.tokens_per_second) if here.fits else "-"
    most, least = (format_bytes(prediction.peak_bytes) for prediction in (option.fastest, option.least))
    host = format_bytes(here.prediction.host_bytes) if here.fits else "-"
    return f"  {_METHODS[method]}", needs, host, tokens, most, least


def _advice_figures(advice: Advice) -> dict[str, Any]:
    options: dict[str, Any] = {
        method: {
            "fits": option.here.fits,
            "here": prediction_figures(option.here.prediction),
            "fastest": prediction_figures(option.fastest),
            "least": prediction_figures(option.least),
        }
        for method, option in advice.options.items()
    }
    return {"method": advice.method, "why": advice.why, **options}
