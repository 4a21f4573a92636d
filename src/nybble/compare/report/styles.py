"""How arms and categories are told apart: by colour, and without it by dash, marker and hatch."""

from __future__ import annotations

from typing import NamedTuple

COLOURS = 8

_DASHES = ("", "8 4", "2 3", "10 3 2 3", "14 4")
# Paths around (0, 0), 8 wide.
_MARKERS = (
    "M-4 0A4 4 0 1 0 4 0A4 4 0 1 0 -4 0Z",
    "M-3.5 -3.5H3.5V3.5H-3.5Z",
    "M0 -4.5L4.5 3.5H-4.5Z",
    "M0 -5L5 0L0 5L-5 0Z",
    "M0 4.5L4.5 -3.5H-4.5Z",
    "M-4.5 -1.5H-1.5V-4.5H1.5V-1.5H4.5V1.5H1.5V4.5H-1.5V1.5H-4.5Z",
    "M-4.5 0L-2.2 -4H2.2L4.5 0L2.2 4H-2.2Z",
)
# What is drawn over a fill, in a square of 8 by 8.
HATCHES = (
    "M0 8L8 0",
    "M0 4H8",
    "M0 0L8 8",
    "M4 0V8",
    "M0 8L8 0M0 0L8 8",
    "M0 4H8M4 0V8",
    "M4 3V5M3 4H5",
    "",
)


class Style(NamedTuple):
    """number: the same in the picture and its legend. colour, hatch: indices; dash, marker: as SVG writes them."""

    number: int
    colour: int
    hatch: int
    dash: str
    marker: str


def style(index: int) -> Style:
    """The style of the index-th arm; dash and marker together are its own up to 35 arms."""
    dash, marker = _DASHES[index % len(_DASHES)], _MARKERS[index % len(_MARKERS)]
    return Style(index, index % COLOURS, index % len(HATCHES), dash, marker)
