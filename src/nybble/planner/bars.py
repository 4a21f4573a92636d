"""Amounts of memory as bars that can be read without colour: each begins where the one above it ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.bar import Bar
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Column, Table
from rich.text import Text

from nybble.planner.prediction import Phase

_GIB = 2**30
# From what stays to what comes and goes; names that are not here follow, the largest first.
_ORDER = ("context", "weights", "adapters", "adapter copies", "moments", "gradients", "streaming slots")
_NAMES = {
    "mlp": "MLP activations",
    "attention": "attention activations",
    "norms": "norm activations",
    "stream": "residual stream",
    "low rank": "x A^T of adapters",
}
_COLOURS = ("cyan", "green", "yellow", "magenta", "blue")
_SMALL = 0.01  # of the whole: what is less is shown together


def breakdown(categories: Mapping[str, int], budget_bytes: int) -> Table:
    """One bar a category, side by side, and what is left of the budget or beyond it. In GiB."""
    table = _table()
    held = sum(categories.values())
    scale = max(budget_bytes, held)
    begin = 0
    for number, (name, nbytes) in enumerate(_sorted(categories)):
        bar = Bar(scale, begin, begin + nbytes, color=_COLOURS[number % len(_COLOURS)])
        _add(table, _NAMES.get(name, name), nbytes, bar)
        begin += nbytes
    if held <= budget_bytes:
        _add(table, "free", budget_bytes - held, _Dots(scale, held, budget_bytes), style="dim")
    else:
        _add(table, "beyond", held - budget_bytes, Bar(scale, budget_bytes, held, color="red"), style="red")
    return table


def peaks(phases: Mapping[str, Phase], budget_bytes: int) -> Table:
    """One bar a phase, all from the left, for the device; figures for both device and host. In GiB."""
    table = _table(Column(justify="right"))
    table.add_row("", *(Text(name, style="dim") for name in ("device", "host")))
    scale = max(budget_bytes, *(phase.device_bytes for phase in phases.values()))
    for name, phase in phases.items():
        within = phase.device_bytes <= budget_bytes
        bar = Bar(scale, 0, phase.device_bytes, color="cyan" if within else "red")
        host = f"{phase.host_bytes / _GIB:.2f}" if phase.host_bytes else ""
        _add(table, name, phase.device_bytes, host, bar, style="" if within else "red")
    return table


@dataclass(frozen=True)
class _Dots:
    """As a Bar, of what is not there."""

    size: int
    begin: int
    end: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        begin, end = (round(options.max_width * place / self.size) for place in (self.begin, self.end))
        yield Text(" " * begin + "·" * (end - begin), style="dim")


def _sorted(categories: Mapping[str, int]) -> list[tuple[str, int]]:
    held = sum(categories.values())
    large = {name: nbytes for name, nbytes in categories.items() if nbytes >= _SMALL * held}
    known = [name for name in _ORDER if name in large]
    rest = sorted(large.keys() - set(known), key=lambda name: (-large[name], name))
    small = held - sum(large.values())
    return [*((name, large[name]) for name in [*known, *rest]), *([("others", small)] if small else [])]


def _table(*more: Column) -> Table:
    columns = Column(no_wrap=True), Column(justify="right"), *more, Column(ratio=1)
    return Table.grid(*columns, padding=(0, 2, 0, 0), expand=True)


def _add(table: Table, name: str, nbytes: int, *more: RenderableType, style: str = "") -> None:
    table.add_row(Text(f"  {name}", style=style), Text(f"{nbytes / _GIB:.2f}", style=style), *more)
