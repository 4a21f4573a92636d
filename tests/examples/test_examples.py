"""The examples run as they stand, on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoTokenizer

from nybble.config import RunConfig
from nybble.inference import load_for_inference
from nybble.models.config import ModelConfig
from nybble.models.generate import stream_chat

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"prompt": f"What is {i}?", "completion": f"It is the number {i}."} for i in range(8)]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# PEFT asks Transformers by an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_plain_loop_then_peft(
    tiny: Callable[..., Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    base, adapter = tiny("smollm", dtype="bfloat16"), tmp_path / "adapter"
    example("plain_loop").main(str(base), str(data), adapter, steps=2)
    assert "step 2: loss" in capsys.readouterr().out

    answer = example("serve_with_peft").main(str(base), str(adapter), "What is 3?", max_new_tokens=8)
    # PEFT runs the 16-bit base in fp32, so that is what it is compared with.
    ours = load_for_inference(ModelConfig(name=str(base), storage="fp32"), adapter)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    messages = [{"role": "user", "content": "What is 3?"}]
    assert answer == "".join(stream_chat(ours.model, tokenizer, messages, max_new_tokens=8))


def test_make_docstring_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["make_docstring_pairs.py", str(tmp_path / "pairs"), "--validation-pairs", "5"])
    example("make_docstring_pairs").main()
    assert "5 held out" in capsys.readouterr().out
    assert len((tmp_path / "pairs" / "valid.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize("name", ["lora.yaml", "qlora-8b.yaml"])
def test_settings_are_valid(name: str) -> None:
    config = RunConfig.read(EXAMPLES / name, {})
    assert config.method in name
