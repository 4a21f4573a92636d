"""`nybble eval` of questions, beside and without held-out rows; for base, adapter and merged model alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Nybble = Callable[..., Result]
LENGTH = ("--set", "data.max_length=64")


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    rows = [{"question": f"What is valid {n}?", "answer": f"It is the number {n}."} for n in range(3)]
    choices = [{"question": f"What is {n}?", "choices": ["odd", "even"], "answer": n % 2} for n in range(4)]
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows + choices))
    return file


def test_base_adapter_and_merged_model_answer(
    nybble: Nybble, tiny: Callable[..., Path], trained: Path, asked: Path, tmp_path: Path
) -> None:
    nybble("merge", "--adapter", trained, "--output", tmp_path / "merged", "--base", "dequantized")
    given = {
        "base": ("--model", tiny("smollm")),
        "adapter": ("--adapter", trained),  # which names its base
        "merged": ("--model", tmp_path / "merged"),
    }
    said = {}
    for name, options in given.items():
        file = tmp_path / f"{name}.jsonl"
        call = ("eval", *options, "--questions", asked, "--answers", file, "--max-new-tokens", 12, "--json")
        figures = json.loads(nybble(*call).stdout)
        assert "loss" not in figures
        scores = figures["questions"]["scores"]
        assert {score: scores[score]["questions"] for score in scores} == {
            "exact match": 3,
            "ROUGE-L": 3,
            "accuracy": 4,
            "accuracy by length": 4,
        }
        low, high = scores["accuracy"]["interval"]
        assert low < scores["accuracy"]["value"] < high or scores["accuracy"]["value"] in (low, high)
        said[name] = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(said[name]) == 7
    texts = {name: [answer["given"] for answer in answers[:3]] for name, answers in said.items()}
    assert texts["adapter"] != texts["base"]
    assert texts["adapter"] == texts["merged"]
    assert said["base"][0]["expected"] == ["It is the number 0."]


def test_rows_and_questions_in_one_go(nybble: Nybble, tiny: Callable[..., Path], data: Path) -> None:
    given = ("--model", tiny("smollm"), "--data", data, "--questions", data, "--max-new-tokens", 4, *LENGTH)
    figures = json.loads(nybble("eval", *given, "--json").stdout)
    interval = figures["loss_interval"]
    assert interval["low"] < figures["loss"] < interval["high"]
    assert figures["perplexity_interval"]["low"] < figures["perplexity"] < figures["perplexity_interval"]["high"]
    assert figures["questions"]["scores"]["exact match"]["questions"] == 4  # of the folder's valid file
    printed = nybble("eval", *given).stdout
    for words in ("held-out loss", "perplexity", "95% interval", "exact match", "ROUGE-L"):
        assert words in printed


def test_rows_that_were_cut_or_left_out_are_told(nybble: Nybble, tiny: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    texts = [("Short?", "Yes."), ("Short?", "No " * 80), ("Long? " * 40, "Beyond.")]
    file.write_text("".join(json.dumps({"prompt": ask, "completion": said}) + "\n" for ask, said in texts))
    given = ("--model", tiny("smollm"), "--data", file, *LENGTH)
    note = "note: of 3 rows, 2 cut to data.max_length, 1 of these left out, with no answer within it"
    assert note in nybble("eval", *given).stdout.splitlines()
    figures = json.loads(nybble("eval", *given, "--json").stdout)
    assert figures["rows"] == 2
    assert {name: figures["data"][name] for name in ("rows", "samples", "truncated", "dropped")} == {
        "rows": 3,
        "samples": 3,
        "truncated": 2,
        "dropped": 1,
    }
    file.write_text(json.dumps({"prompt": "Short?", "completion": "Yes."}))
    assert "note:" not in nybble("eval", *given).output
    # Of held-out rows, not of those to train on.
    held_out = (*given, "--set", f"data.validation_path={file}")
    assert json.loads(nybble("eval", *held_out, "--json").stdout)["data"]["rows"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--answers", "answers.jsonl"), "--answers: there are no questions"),
        (("--few-shot", 2, "--chat-template"), "--few-shot, --chat-template: there are no tasks"),
        (("--questions", "q.jsonl", "--answers", "/proc/nybble/answers.jsonl"), "/proc/nybble: cannot be written"),
    ],
)
def test_options_that_lead_nowhere(nybble: Nybble, options: tuple[str, ...], message: str) -> None:
    assert message in nybble("eval", "--model", "m", "--data", "d", *options, fails=2).output


def test_what_is_wrong_shows_before_weights_are_read(nybble: Nybble, tiny: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"question": "q", "choices": ["a", "b"], "answer": "c"}\n')
    result = nybble("eval", "--model", tiny("smollm"), "--questions", file, fails=2)
    assert "is none of its choices" in result.output


def test_memory_settings_are_heeded_and_told(nybble: Nybble, tiny: Callable[..., Path], data: Path) -> None:
    given = ("--model", tiny("smollm"), "--data", data, *LENGTH)
    refused = "memory: the model does not fit: "
    assert refused in nybble("eval", *given, "--set", "memory.budget=1MiB", fails=2).output
    assert refused in nybble("chat", *given[:2], "-p", "Hi", "--set", "memory.budget=1MiB", fails=2).output
    streamed = nybble("eval", *given, "--set", "memory.weights=streamed")
    assert "plan: weights streamed from host memory" in streamed.stderr
    plain = nybble("eval", *given)
    assert "plan:" not in plain.stderr
    losses = [[line for line in run.stdout.splitlines() if "held-out loss" in line] for run in (plain, streamed)]
    assert losses[0] == losses[1] != []
