"""docs/settings.md has every setting as it is now."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "settings_page.py"))


def test_the_page_has_the_settings_as_they_are(script: dict[str, Any]) -> None:
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert script["updated"](text) == text, "run scripts/settings_page.py: the settings have changed"


def test_every_setting_says_what_it_does(script: dict[str, Any]) -> None:
    fields = {f"{name}.{key}": field for name, cls in script["sections"]() for key, field in cls.model_fields.items()}
    silent = [name for name, field in fields.items() if not (field.description or script["_is_section"](field))]
    assert len(fields) > 60
    assert not silent
