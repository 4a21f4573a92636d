"""The whole demonstration on a tiny model: it ends with exit code 1, because a random model cannot learn enough."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from typer.testing import CliRunner

from nybble.cli import app


def test_demo_from_data_to_answers(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny("smollm", dtype="bfloat16")
    output = tmp_path / "demo"
    arguments = ["demo", "--model", str(model), "--output", str(output), "--steps", "1", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    assert "fell by less than 0.8 nats" in result.stderr
    figures = json.loads(result.stdout)
    assert [arm["name"] for arm in figures["arms"]] == ["base", "lora", "qlora"]
    assert figures["answers"].keys() == {"before", "after"}
    assert (output / "merged" / "merge.json").exists()
    assert "What does Python&#39;s" in (output / "report.html").read_text(encoding="utf-8")  # a sample's question
    assert "report.html" in result.stderr

    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert json.loads(again.stdout)["arms"] == figures["arms"]  # kept, not trained again
