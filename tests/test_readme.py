"""The README shows what the kept results say."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_tables_are_those_of_the_kept_results() -> None:
    report = runpy.run_path(str(ROOT / "benchmarks" / "report.py"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report["updated"](readme) == readme


def test_every_file_that_it_names_is_there() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [part.split(")")[0] for part in readme.split("](")[1:]]
    assert not [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
