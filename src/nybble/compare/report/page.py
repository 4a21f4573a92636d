"""The report as one HTML page that holds all it shows."""

from __future__ import annotations

from pathlib import Path

import jinja2

from nybble.compare.report.bars import memory_bars, speed_bars
from nybble.compare.report.content import content
from nybble.compare.report.intervals import difference_intervals
from nybble.compare.report.lines import loss_panels
from nybble.compare.report.styles import COLOURS, HATCHES, style
from nybble.compare.result import Comparison


def html_report(comparison: Comparison) -> str:
    # No extension tells the loader what is HTML: every value is escaped.
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    memory = memory_bars(comparison)
    arms = [(arm.name, style(index)) for index, arm in enumerate(comparison.arms)]
    count = max(len(arms), len(memory.holders) if memory else 0)
    return environment.get_template("page.html").render(
        said=content(comparison),
        command=comparison.command,
        samples=comparison.samples,
        intervals=difference_intervals(comparison),
        panels=loss_panels(comparison),
        memory=memory,
        speeds=speed_bars(comparison),
        styles=[style(index) for index in range(count)],
        hatches=HATCHES,
        colours=COLOURS,
    )
