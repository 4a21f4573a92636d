"""One run on cards of several sizes: which it fits, how, and how fast it is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from nybble.planner.cards import DeviceSpec
from nybble.planner.figures import solution_figures
from nybble.planner.solve import Solution
from nybble.planner.words import in_brief, significant
from nybble.units import format_bytes

# One of each size that there is, the commonest.
CARDS = ("rtx 4060", "rtx 4070", "rtx 4080", "rtx 4090", "rtx 5090", "l40s", "h100", "h200")


@dataclass(frozen=True)
class Overview:
    """title: of the run. rows: each card with the run's solution there."""

    title: str
    rows: Sequence[tuple[DeviceSpec, Solution]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.title, style="bold")
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
        for name, justify in (("card", "left"), ("has", "right"), ("needs", "right"), ("tokens/s", "right")):
            table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        table.add_column("how")
        for card, solution in self.rows:
            table.add_row(*_row(card, solution), style="" if solution.fits else "dim")
        yield table

    def figures(self) -> dict[str, Any]:
        """As JSON values."""
        return {"title": self.title, "cards": {card.name: _figures(card, solution) for card, solution in self.rows}}


def _row(card: DeviceSpec, solution: Solution) -> tuple[str, ...]:
    prediction = solution.prediction
    has, needs = format_bytes(card.memory_bytes), format_bytes(prediction.peak_bytes)
    if not solution.fits:
        return card.name, has, needs, "-", "does not fit"
    return card.name, has, needs, significant(prediction.tokens_per_second), in_brief(prediction.plan)


def _figures(card: DeviceSpec, solution: Solution) -> Mapping[str, Any]:
    return {"memory_bytes": card.memory_bytes, **solution_figures(solution)}
