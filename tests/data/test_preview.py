"""The preview marks the trained tokens so that they are seen with colours and without."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

from rich.console import Console

from nybble.data.config import DataConfig
from nybble.data.prepare import PreparedData, prepare_data
from nybble.data.preview import preview_figures, render_preview
from tests.data import templates
from tests.data.templates import tokenizer_with

ROW = {
    "messages": [{"role": "user", "content": "What is [red]this[/red]?"}, {"role": "assistant", "content": "A fox ☃."}]
}


def prepared(folder: Path, *, packing: bool = False, rows: int = 3) -> PreparedData:
    file = folder / "rows.jsonl"
    file.write_text("\n".join([json.dumps(ROW)] * rows))
    config = DataConfig(path=str(file), packing=packing, max_length=280)
    return prepare_data(config, tokenizer_with(templates.CHATML), model_max_length=None)


def printed(data: PreparedData, *, color: bool, samples: int = 2) -> str:
    out = StringIO()
    console = Console(file=out, width=100, force_terminal=color, color_system="standard" if color else None)
    console.print(render_preview(data, tokenizer_with(templates.CHATML), samples=samples))
    return out.getvalue()


def test_trained_tokens_are_marked_without_colours(tmp_path: Path) -> None:
    text = printed(prepared(tmp_path), color=False)
    assert text.count("⟦A fox ☃.<|im_end|>⟧") == 2
    assert "What is [red]this[/red]?<|im_end|>" in text  # markup in the data stays text
    assert "row 1: 8 of" in text
    assert "Training: 3 rows (messages)" in text


def test_trained_tokens_are_coloured(tmp_path: Path) -> None:
    assert "\x1b[1;4;32m⟦A fox ☃.<|im_end|>⟧" in printed(prepared(tmp_path), color=True)


def test_packing_and_long_samples_are_said(tmp_path: Path) -> None:
    text = printed(prepared(tmp_path, packing=True), color=False)
    assert "3 samples packed" in text
    assert "packed into 1 sequences" in text


def test_figures_hold_the_same_as_plain_values(tmp_path: Path) -> None:
    figures = preview_figures(prepared(tmp_path), tokenizer_with(templates.CHATML), samples=1)
    assert json.loads(json.dumps(figures)) == figures
    (sample,) = figures["samples"]
    assert sample["trained"] == ["A fox ☃.<|im_end|>"]
    assert sample["target_tokens"] == 8
    assert "<|im_start|>user\nWhat is [red]this[/red]?<|im_end|>" in sample["text"]
    assert figures["report"]["rows"] == 3
