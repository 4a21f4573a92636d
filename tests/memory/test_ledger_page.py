"""The page shows every byte of the ledger, and needs nothing but itself."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from nybble.memory.ledger import PhaseMemory
from nybble.memory.ledger_page import ledger_page

GB = 2**30


def phases(count: int = 4) -> list[PhaseMemory]:
    step = [
        PhaseMemory(f"layer {n}, forward", {"weights": 3 * GB, "adapters": 0, "activations": n * GB, "temporary": GB})
        for n in range(1, count + 1)
    ]
    back = [
        PhaseMemory(
            f"layer {n}, backward", {"weights": 3 * GB, "activations": n * GB, "temporary": 2 * GB, "context": GB // 2}
        )
        for n in range(count, 0, -1)
    ]
    return [*step, *back, PhaseMemory("update", {"weights": 3 * GB, "cached": GB // 4})]


class Page(HTMLParser):
    """Its rectangles by band, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.bands: list[list[dict[str, float]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "g":
            self.bands.append([])
        if tag == "rect" and "g" in self.open:
            self.bands[-1].append({name: float(values[name].rstrip("%")) for name in ("x", "y", "width", "height")})
        if tag not in ("meta", "path", "rect", "line") or (tag == "rect" and "class" in values):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("count", [1, 4, 80])
def test_bands_are_stacked_without_gaps(count: int) -> None:
    step = phases(count)
    page = Page(ledger_page(step, title="t", subtitle="s"))
    assert not page.open
    assert len(page.bands) == 5  # weights, activations, temporary, context, cached; adapters are nowhere
    top = max(phase.total for phase in step)
    for index, phase in enumerate(step):
        middle = (index + 0.5) * 100 / len(step)
        stack = [r for band in page.bands for r in band if r["x"] <= middle < r["x"] + r["width"]]
        floor = 100.0
        for rectangle in stack:
            assert rectangle["y"] + rectangle["height"] == pytest.approx(floor, abs=0.01)
            floor = rectangle["y"]
        scale = (100 - floor) / phase.total
        assert scale == pytest.approx((100 - min(r["y"] for b in page.bands for r in b)) / top, rel=1e-3)


def test_the_peak_is_named_with_its_figures() -> None:
    text = ledger_page(phases(), title="one step", subtitle="of nothing")
    assert "Peak 9.50 GiB" in text
    assert "“layer 4, backward”, 5 of 9" in text
    assert re.search(r"weights</span>\s*</td>\s*<td>3.00 GiB", text)
    assert "adapters" not in text
    assert ">forward<" in text
    assert ">backward<" in text


def test_the_page_fetches_nothing_and_escapes_names() -> None:
    text = ledger_page([PhaseMemory("<b>", {"a & b": 5})], title="<script>", subtitle="s")
    assert "http" not in text
    assert "<script>" not in text
    assert "a &amp; b" in text


def test_bands_differ_without_colour() -> None:
    text = ledger_page(phases(), title="t", subtitle="s")
    hatches = re.findall(r'<path d="([^"]*)"', text)
    assert len(hatches) == 5
    assert len(set(hatches)) == 5
