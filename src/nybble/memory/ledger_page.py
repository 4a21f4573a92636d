"""A ledger as one page to look at: a stacked picture over the phases of a step, and its figures. Nothing is fetched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from nybble.memory.ledger import ACTIVATIONS, CACHED, CONTEXT, OTHER, TEMPORARY, PhaseMemory
from nybble.units import format_bytes

_TEMPLATE = Path(__file__).with_name("ledger_page.html")

_MEANINGS = {
    ACTIVATIONS: "what one phase leaves for a later one",
    OTHER: "there before the step began: batches, buffers, libraries' workspaces",
    TEMPORARY: "made and given up within a phase",
    CACHED: "what PyTorch's allocator keeps for later use, CUDA graphs' memory too",
    CONTEXT: "beyond the allocator, with the libraries",
}

# So that bands are told apart without colour: what is drawn over each, in a square of 8 by 8.
_HATCHES = (
    "",
    "M0 8L8 0",
    "M0 0L8 8",
    "M0 4H8",
    "M4 0V8",
    "M0 8L8 0M0 0L8 8",
    "M4 3V5M3 4H5",
    "M0 4H8M4 0V8",
    "M0 7H1M4 3H5",
    "M1 1H3M5 5H7",
)
# Of those, the ones for what is in no inventory; the rest go to the inventory's categories in order.
_STYLES = {ACTIVATIONS: 5, OTHER: 6, TEMPORARY: 7, CACHED: 8, CONTEXT: 9}
_FREE_STYLES = 5

_MOST_TICKS = 6


class Rectangle(NamedTuple):
    """In percent of the picture, from its upper left."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Band:
    """One category over all phases."""

    name: str
    meaning: str
    style: int
    rectangles: Sequence[Rectangle]
    at_peak: str
    most: str


def ledger_page(phases: Sequence[PhaseMemory], *, title: str, subtitle: str) -> str:
    """The page of the phases of one step, of which there is at least one."""
    peak = max(range(len(phases)), key=lambda index: phases[index].total)
    step, top = _scale(phases[peak].total)
    width = 100 / len(phases)
    bands = _bands(phases, peak, top)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        subtitle=subtitle,
        peak_text=format_bytes(phases[peak].total),
        peak_phase=phases[peak].name,
        peak_number=peak + 1,
        peak_x=round((peak + 0.5) * width, 3),
        bands=bands,
        hatches=_HATCHES,
        ticks=[{"top": 100 - 100 * value / top, "text": _tick(value)} for value in range(0, top + 1, step)],
        columns=[
            {"x": round(index * width, 3), "width": round(width, 3), "text": f"{phase.name}: {_listed(phase)}"}
            for index, phase in enumerate(phases)
        ],
        groups=_groups(phases),
        rows=[
            [phase.name, *(format_bytes(phase.held.get(band.name, 0)) for band in bands), format_bytes(phase.total)]
            for phase in phases
        ],
    )


def _bands(phases: Sequence[PhaseMemory], peak: int, top: int) -> list[Band]:
    """What is anywhere more than nothing, from the bottom of the picture to its top."""
    categories = dict.fromkeys(category for phase in phases for category in phase.held)
    shown = [category for category in categories if any(phase.held.get(category, 0) for phase in phases)]
    own = [category for category in shown if category not in _STYLES]
    styles = _STYLES | {category: index % _FREE_STYLES for index, category in enumerate(own)}
    below = [0] * len(phases)
    bands = []
    for category in shown:
        sizes = [phase.held.get(category, 0) for phase in phases]
        bands.append(
            Band(
                category,
                _MEANINGS.get(category, ""),
                styles[category],
                list(_rectangles(below, sizes, top)),
                format_bytes(sizes[peak]),
                format_bytes(max(sizes)),
            )
        )
        below = [low + size for low, size in zip(below, sizes, strict=True)]
    return bands


def _rectangles(below: Sequence[int], sizes: Sequence[int], top: int) -> Iterable[Rectangle]:
    """One for each run of phases in which nothing changes."""
    width = 100 / len(sizes)
    start = 0
    for (low, size), run in groupby(zip(below, sizes, strict=True)):
        count = len(list(run))
        if size:
            y = 100 - 100 * (low + size) / top
            yield Rectangle(*(round(value, 3) for value in (start * width, y, count * width, 100 * size / top)))
        start += count


def _groups(phases: Sequence[PhaseMemory]) -> list[dict[str, Any]]:
    """The passes of the step below the picture; names only where there is room for them."""
    width, start = 100 / len(phases), 0
    groups = []
    for name, run in groupby(phases, key=lambda phase: phase.name.rpartition(", ")[2]):
        count = len(list(run))
        text = name if count * width >= 12 else ""
        groups.append({"x": round(start * width, 3), "width": round(count * width, 3), "text": text})
        start += count
    return groups


def _scale(largest: int) -> tuple[int, int]:
    """Bytes between two ticks, of a round number of binary units, and those at the top of the picture."""
    step = 2**20
    while step * _MOST_TICKS < largest:
        step *= 2
    return step, -(-max(largest, 1) // step) * step


def _tick(value: int) -> str:
    unit, name = (2**30, "GiB") if value >= 2**30 else (2**20, "MiB")
    return f"{value / unit:g} {name}" if value else "0"


def _listed(phase: PhaseMemory) -> str:
    parts = (f"{category} {format_bytes(nbytes)}" for category, nbytes in phase.held.items() if nbytes)
    return f"{format_bytes(phase.total)} ({', '.join(parts)})"
