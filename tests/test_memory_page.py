"""docs/memory.md shows what the planner says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "memory.md"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "memory_page.py"))


def test_a_table_of_the_page_is_what_the_planner_says(script: dict[str, Any]) -> None:
    """One of eight: all take half a minute."""
    table = "\n".join(script["ways"](24))
    fix = "run scripts/memory_page.py: the planner has changed"
    assert f"<!-- fits 24 -->\n{table}\n<!-- /fits 24 -->" in PAGE.read_text(encoding="utf-8"), fix


def test_every_table_has_a_place(script: dict[str, Any]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    names = [*script["METHODS"], *map(str, script["CARDS"])]
    assert re.findall("<!-- fits (.*?) -->", text) == names


def test_every_setting_of_memory_is_explained() -> None:
    from nybble.memory.config import MemoryConfig

    text = PAGE.read_text(encoding="utf-8")
    assert not [name for name in MemoryConfig.model_fields if f"`memory.{name}`" not in text]
