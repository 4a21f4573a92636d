"""`nybble plan`: from config.json alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Nybble = Callable[..., Result]


@pytest.fixture
def folder(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A model without weights and tokenizer."""
    shutil.copy(tiny("llama") / "config.json", tmp_path)
    return tmp_path


def test_a_run_on_a_card(nybble: Nybble, folder: Path) -> None:
    shown = nybble("plan", "--model", str(folder), "--gpu", "rtx 4090", "--set", "lora.r=4").output
    assert "QLoRA on RTX 4090 with 23.50 GiB" in shown
    assert "It fits" in shown
    assert "LoRA or QLoRA" in shown
    assert f"{4 * 2 * (128 + 96 + 96 + 128 + 3 * 160):,} of" in shown


def test_memory_is_of_the_card_or_of_some_card(nybble: Nybble, folder: Path) -> None:
    def figures(*options: str) -> dict[str, object]:
        return json.loads(nybble("plan", "--model", str(folder), "--json", *options).output)

    assert figures("--gpu", "h100", "--memory", "9GiB")["budget_bytes"] == 9 * 2**30
    assert figures("--memory", "11.5 GB")["budget_bytes"] == 11.5 * 2**30
    found = figures("--gpu", "h100", "--method", "lora", "--set", "memory.budget=7GiB")
    assert (found["method"], found["budget_bytes"]) == ("lora", 7 * 2**30)


def test_without_a_card_all_sizes_are_shown(nybble: Nybble, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    shown = nybble("plan", "--model", str(folder)).output
    assert all(card in shown for card in ("RTX 4060", "RTX 4090", "H100"))
    assert set(json.loads(nybble("plan", "--model", str(folder), "--json").output)["cards"]) >= {"RTX 4060", "H100"}


def test_gpt3_has_no_checkpoint(nybble: Nybble) -> None:
    settings = ["--set", "lora.r=4", "--set", "lora.target_modules=[q_proj, v_proj]"]
    shown = nybble("plan", "--model", "gpt3", "--method", "lora", "--gpu", "b200", *settings).output
    assert "18,874,368 of 174,604,259,328 parameters train, 1 in 9,251" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "h10"], "Did you mean 'h100'?"),
        (["--memory", "much"], "--memory: 'much' is no amount of memory"),
        (["--model", "/nowhere/at/all"], "neither a folder here nor"),
        (["--set", "data.max_length=1000000"], "data.max_length: is 1000000"),
    ],
)
def test_mistakes_are_explained(nybble: Nybble, folder: Path, options: list[str], message: str) -> None:
    model = [] if "--model" in options else ["--model", str(folder)]
    result = nybble("plan", "--gpu", "h100", *model, *options, fails=2)
    assert message in result.stderr


@pytest.mark.parametrize("option", ["--gpu", "--memory", "--host-memory"])
def test_mistakes_are_found_before_the_hub_is_asked(
    nybble: Nybble, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("nybble.models.hub.read_model_config", lambda *name: asked.append(name))
    assert option in nybble("plan", "--model", "some/model", option, "much", fails=2).stderr
    assert asked == []


def test_a_folder_without_config_is_told(nybble: Nybble, tmp_path: Path) -> None:
    assert "no config.json here" in nybble("plan", "--model", str(tmp_path), "--gpu", "h100", fails=2).stderr
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    assert "'resnet'" in nybble("plan", "--model", str(tmp_path), "--gpu", "h100", fails=2).stderr
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    shown = nybble("plan", "--model", str(tmp_path), "--gpu", "h100", fails=2).stderr
    assert "config.json: does not say 'hidden_size'" in shown


def test_it_does_without_torch(folder: Path) -> None:
    code = (
        "import sys; from nybble.cli import app\n"
        f"app(['plan', '--model', {str(folder)!r}, '--gpu', 'h100'], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
