"""Every verb, end to end, on a tiny checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import Result

from tests.cli.conftest import SMALL

Nybble = Callable[..., Result]
LENGTH = ("--set", "data.max_length=64")
VERBS = ["train", "eval", "chat", "merge", "quantize", "preview", "compare", "demo", "doctor"]


@pytest.mark.parametrize("verb", VERBS)
def test_help(nybble: Nybble, verb: str) -> None:
    assert f"nybble {verb}" in nybble(verb, "--help").stdout
    assert verb in nybble("--help").stdout


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_train(nybble: Nybble, tiny: Callable[..., Path], data: Path, tmp_path: Path, method: str) -> None:
    given = ("--model", tiny("llama"), "--data", data, "--method", method, "--output", tmp_path / "run")
    result = nybble("train", *given, *SMALL, "--json")
    figures = json.loads(result.stdout)
    assert figures["config"]["method"] == method
    assert figures["steps"] == len(figures["losses"]) == 3
    assert [evaluation["step"] for evaluation in figures["evaluations"]] == [0, 3]
    assert (tmp_path / "run" / ("model" if method == "full" else "adapter")).is_dir()


def test_train_takes_a_file_then_options_then_set(
    nybble: Nybble, tiny: Callable[..., Path], data: Path, tmp_path: Path
):
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {{name: nowhere}}\ndata: {{path: {data}}}\nmethod: full\nlora: {{r: 3}}\n")
    given = ("--model", tiny("llama"), "--method", "lora", "--output", tmp_path / "run", "--set", "lora.r=5")
    figures = json.loads(nybble("train", config, *given, *SMALL, "--json").stdout)
    assert (figures["config"]["method"], figures["config"]["lora"]["r"]) == ("lora", 5)


def test_train_prints_what_happened(nybble: Nybble, tiny: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    result = nybble("train", "--model", tiny("llama"), "--data", data, "--output", tmp_path / "run", *SMALL)
    assert "held-out loss" in result.stdout
    assert str(tmp_path / "run" / "adapter") in result.stdout


def test_train_shows_its_memory(nybble: Nybble, tiny: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    page = tmp_path / "memory.html"
    given = ("--model", tiny("llama"), "--data", data, "--output", tmp_path / "run", *SMALL)
    nybble("train", *given, "--memory-report", page)
    assert "layer 2, backward" in page.read_text()


def test_train_says_when_it_made_the_model_worse(
    nybble: Nybble, tiny: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    given = ("--model", tiny("smollm"), "--data", data, "--output", tmp_path / "run", *SMALL, "--method", "full")
    printed = nybble("train", *given, "--set", "optim.learning_rate=1").stdout
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    before, after = (evaluation["loss"] for evaluation in run["evaluations"])
    assert after > before
    assert f"held-out loss {before:.4f} -> {after:.4f}" in printed


def test_eval_of_base_and_adapter(nybble: Nybble, tiny: Callable[..., Path], data: Path, trained: Path) -> None:
    run = json.loads((trained / "run.json").read_text())
    given = ("--model", tiny("smollm"), "--data", data, *LENGTH, "--json")
    base = json.loads(nybble("eval", *given, "--set", "model.storage=nf4").stdout)
    adapted = json.loads(nybble("eval", *given, "--adapter", trained).stdout)
    # The same rows as in the run, in other batches and summed row by row.
    assert base["loss"] == pytest.approx(run["evaluations"][0]["loss"], rel=1e-6)
    assert adapted["loss"] == pytest.approx(run["evaluations"][-1]["loss"], rel=1e-6)
    assert (base["rows"], adapted["storage"]) == (4, "nf4")
    assert "held-out loss" in nybble("eval", *given[:-1]).stdout


def test_eval_takes_the_settings_of_a_run(nybble: Nybble, trained: Path) -> None:
    run = json.loads((trained / "run.json").read_text())
    figures = json.loads(nybble("eval", trained / "config.yaml", "--adapter", trained, "--json").stdout)
    assert figures["loss"] == pytest.approx(run["evaluations"][-1]["loss"], rel=1e-6)


def test_chat_answers_a_prompt(nybble: Nybble, tiny: Callable[..., Path], trained: Path) -> None:
    given = ("--model", tiny("smollm"), "--prompt", "What is train 1?", "--max-new-tokens", 8)
    plain = nybble("chat", *given).stdout
    adapted = nybble("chat", *given, "--adapter", trained).stdout
    assert plain.strip()
    assert adapted.strip()
    assert plain != adapted


@pytest.mark.parametrize("end", ["\n", ""])
def test_chat_goes_on_until_an_empty_line_or_the_end(tiny: Callable[..., Path], end: str) -> None:
    from typer.testing import CliRunner

    from nybble.cli import app

    given = ["chat", "--model", str(tiny("smollm")), "--max-new-tokens", "4"]
    result = CliRunner().invoke(app, given, input=f"Hello there\nAnd again\n{end}")
    assert result.exit_code == 0
    assert result.stdout.count("you>") == 3


@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_merge(nybble: Nybble, trained: Path, tmp_path: Path, base: str) -> None:
    output = tmp_path / "merged"
    result = nybble("merge", "--adapter", trained, "--output", output, "--base", base)
    assert base in result.stdout
    assert json.loads((output / "merge.json").read_text())["base"] == base
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    assert torch.isfinite(model(torch.arange(4, 20)[None]).logits).all()


def test_merge_measures_both_bases_and_keeps_the_better(
    nybble: Nybble, data: Path, trained: Path, tmp_path: Path
) -> None:
    figures = json.loads(
        nybble("merge", "--adapter", trained, "--output", tmp_path / "m", "--data", data, *LENGTH, "--json").stdout
    )
    losses = {base: found["merged_loss"] for base, found in figures["measured"].items()}
    assert losses.keys() == {"original", "dequantized"}
    assert figures["base"] == min(losses, key=losses.__getitem__)
    run = json.loads((trained / "run.json").read_text())
    assert figures["measured"]["dequantized"]["adapter_loss"] == pytest.approx(run["evaluations"][-1]["loss"], rel=1e-6)


def test_quantize_then_evaluate(nybble: Nybble, tiny: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    folder = tiny("smollm", dtype="bfloat16")
    figures = json.loads(nybble("quantize", "--model", folder, "--output", tmp_path / "q", "--json").stdout)
    assert 4.1 < figures["bits_per_weight"] < 4.2
    from_folder = json.loads(nybble("eval", "--model", tmp_path / "q", "--data", data, *LENGTH, "--json").stdout)
    on_the_way = json.loads(
        nybble("eval", "--model", folder, "--data", data, *LENGTH, "--set", "model.storage=nf4", "--json").stdout
    )
    assert from_folder["loss"] == on_the_way["loss"]


def test_quantize_says_that_experts_are_left_out(nybble: Nybble, tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny("mixtral", dtype="bfloat16")
    assert "weights of experts stay in bf16" in nybble("quantize", "--model", folder, "--output", tmp_path / "q").stdout


def test_preview(nybble: Nybble, tiny: Callable[..., Path], data: Path) -> None:
    given = ("--model", tiny("smollm"), "--data", data, *LENGTH, "--samples", 2)
    assert "It is the number 0." in nybble("preview", *given).stdout
    figures = json.loads(nybble("preview", *given, "--json").stdout)
    assert [sample["row"] for sample in figures["samples"]] == [1, 2]


def test_doctor(nybble: Nybble) -> None:
    assert json.loads(nybble("doctor", "--json").stdout)["healthy"]
    assert nybble("doctor").stdout.count("pass") == 3


def test_quantize_by_a_text(nybble: Nybble, tiny: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    given = ("--model", tiny("smollm", dtype="bfloat16"), "--calibration", data, "--calibration-tokens", 256)
    figures = json.loads(nybble("quantize", *given, "--output", tmp_path / "q", "--json").stdout)
    assert (figures["rounding"], figures["calibration_tokens"]) == ("compensated", 256)
    assert (tmp_path / "q" / "correction.safetensors").exists()
    assert 4.1 < figures["bits_per_weight"] < 4.2
    printed = nybble("quantize", *given, "--rounding", "weighted", "--output", tmp_path / "w").stdout
    assert "rounding: weighted, calibrated on 256 tokens" in printed


def test_quantize_takes_its_rounding_from_the_settings(
    nybble: Nybble, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    given = ("--model", tiny("smollm"), "--set", "model.rounding=search", "--output", tmp_path / "q", "--json")
    assert json.loads(nybble("quantize", *given).stdout)["rounding"] == "search"


def test_merge_into_nf4(nybble: Nybble, data: Path, trained: Path, tmp_path: Path) -> None:
    given = ("--adapter", trained, "--storage", "nf4", "--data", data, *LENGTH)
    figures = json.loads(nybble("merge", *given, "--output", tmp_path / "m", "--json").stdout)
    assert (figures["storage"], figures["base"], figures["rounding"]) == ("nf4", "original", "search")
    evaluated = json.loads(nybble("eval", "--model", tmp_path / "m", "--data", data, *LENGTH, "--json").stdout)
    assert evaluated["storage"] == "nf4"
    assert evaluated["loss"] == pytest.approx(figures["nf4_loss"], rel=1e-6)
    text = ("--calibration", data, "--calibration-tokens", 256)
    printed = nybble("merge", *given, *text, "--output", tmp_path / "c").stdout
    assert "then rounded to NF4 by compensated" in printed
