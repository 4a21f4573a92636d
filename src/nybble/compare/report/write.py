"""Where a report goes."""

from __future__ import annotations

from pathlib import Path

from nybble.compare.report.markdown import markdown_report
from nybble.compare.report.page import html_report
from nybble.compare.result import Comparison
from nybble.files import write_text

PAGE = "report.html"
MARKDOWN = "report.md"


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Write report.html and report.md into `folder`, beside comparison.json; return the page.

    The page is one file: it holds its styles and pictures, and fetches nothing.
    """
    write_text(folder / MARKDOWN, markdown_report(comparison))
    write_text(folder / PAGE, html_report(comparison))
    return folder / PAGE
