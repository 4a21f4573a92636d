"""What goes wrong because of the user: exit code 2, one message that says what and where, no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from nybble.cli.boundary import explained
from tests.cli.conftest import SMALL

Nybble = Callable[..., Result]


def message(result: Result) -> str:
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert result.stderr.count("error:") == 1
    return result.stderr


@pytest.fixture
def given(tiny: Callable[..., Path], data: Path, tmp_path: Path) -> tuple[object, ...]:
    return ("--model", tiny("llama"), "--data", data, "--output", tmp_path / "run", *SMALL)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("lora.alhpa=8", "lora has no setting 'alhpa'; did you mean 'lora_alpha'?"),
        ("lora.r=many", "lora.r"),
        ("lora", "--set"),
        ("lora.target_modules=[q_prj]", "q_prj"),
        ("data.max_length=4096", "512"),
        ("method=lroa", "method"),
    ],
)
def test_settings(nybble: Nybble, given: tuple[object, ...], tmp_path: Path, setting: str, said: str) -> None:
    assert said in message(nybble("train", *given, "--set", setting, fails=2))
    assert not (tmp_path / "run" / "run.json").exists()


def test_several_problems_at_once(nybble: Nybble, given: tuple[object, ...]) -> None:
    said = message(nybble("train", *given, "--set", "lora.alhpa=8", "--set", "train.epochs=-1", fails=2))
    assert "alhpa" in said
    assert "train.epochs" in said


def test_nothing_given(nybble: Nybble) -> None:
    said = message(nybble("train", fails=2))
    assert all(name in said for name in ("model", "data", "output"))


def test_missing_files(nybble: Nybble, given: tuple[object, ...], tmp_path: Path) -> None:
    assert "absent.yaml: no such file" in message(nybble("train", tmp_path / "absent.yaml", fails=2))
    assert "absent.jsonl" in message(nybble("train", *given, "--data", tmp_path / "absent.jsonl", fails=2))
    assert "no config.json" in message(nybble("train", *given, "--model", tmp_path, fails=2))
    assert "absent" in message(nybble("eval", *given[:4], "--adapter", tmp_path / "absent", fails=2))


def test_a_malformed_line(nybble: Nybble, given: tuple[object, ...], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a whole line of text"}\n{"text": \n')
    said = message(nybble("train", *given, "--data", bad, fails=2))
    assert "bad.jsonl" in said
    assert "line 2" in said


def test_what_is_cheap_to_check_comes_before_loading(
    nybble: Nybble, tiny: Callable[..., Path], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nybble.inference.load_model", None)
    absent = ("--data", tmp_path / "absent.jsonl")
    assert "absent.jsonl" in message(nybble("eval", "--model", tiny("smollm"), *absent, fails=2))
    merge = ("merge", "--adapter", trained, *absent, "--output")
    assert "absent.jsonl" in message(nybble(*merge, tmp_path / "merged", fails=2))
    assert "already exists" in message(nybble(*merge, tmp_path, fails=2))
    by_text = ("merge", "--adapter", trained, "--data", trained, "--storage", "nf4", "--output", tmp_path / "merged")
    assert "needs a text" in message(nybble(*by_text, "--rounding", "weighted", fails=2))
    absent = ("--calibration", tmp_path / "absent.txt")
    assert "absent.txt" in message(nybble(*by_text, *absent, fails=2))


def test_quantize_checks_what_is_cheap_before_it_reads_a_text(
    nybble: Nybble, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    made, absent = tmp_path / "q", ("--calibration", tmp_path / "absent.txt")
    nybble("quantize", "--model", tiny("llama"), "--output", made)
    assert "already exists" in message(nybble("quantize", "--model", tiny("llama"), "--output", made, *absent, fails=2))
    again = ("quantize", "--model", made, "--output", tmp_path / "again", *absent)
    assert "in 4 bit already" in message(nybble(*again, fails=2))


def test_options_that_would_do_nothing(
    nybble: Nybble, tiny: Callable[..., Path], data: Path, trained: Path, tmp_path: Path
) -> None:
    merge = ("merge", "--adapter", trained, "--output", tmp_path / "merged")
    for option, value in (("--calibration", data), ("--rounding", "search"), ("--calibration-tokens", 64)):
        assert f"{option}: says how weights become 4 bits" in message(nybble(*merge, option, value, fails=2))
    quantize = ("quantize", "--model", tiny("llama"), "--output", tmp_path / "q")
    for command in (quantize, (*merge, "--storage", "nf4")):
        assert "--calibration-tokens: there is no text" in message(
            nybble(*command, "--calibration-tokens", 64, fails=2)
        )


def test_a_truncated_model(nybble: Nybble, tiny: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    said = message(nybble("eval", "--model", folder, "--data", data, fails=2))
    assert "model.safetensors" in said


def test_a_model_without_a_tokenizer(nybble: Nybble, tiny: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    said = message(nybble("eval", "--model", folder, "--data", data, fails=2))
    assert "no tokenizer can be read here" in said
    assert "it needs tokenizer.json" in said


def test_an_adapter_of_another_base(nybble: Nybble, tiny: Callable[..., Path], data: Path, trained: Path) -> None:
    other = tiny("smollm", seed=7)
    said = message(nybble("eval", "--model", other, "--data", data, "--adapter", trained, fails=2))
    assert "was trained on" in said
    said = message(nybble("merge", "--model", other, "--adapter", trained, "--output", trained / "m", fails=2))
    assert "was trained on" in said
    assert not (trained / "m").exists()


def test_another_run_is_not_overwritten(nybble: Nybble, tiny: Callable[..., Path], data: Path, trained: Path) -> None:
    before = (trained / "run.json").read_text()
    given = ("--model", tiny("smollm"), "--data", data, "--output", trained)
    assert "Choose another output folder" in message(nybble("train", *given, fails=2))
    assert (trained / "run.json").read_text() == before


def test_output_that_exists(nybble: Nybble, tiny: Callable[..., Path], tmp_path: Path) -> None:
    assert "already exists" in message(nybble("quantize", "--model", tiny("llama"), "--output", tmp_path, fails=2))


def test_a_file_where_a_folder_is_needed(nybble: Nybble, given: tuple[object, ...], tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    assert "a file stands where a folder is needed" in message(nybble("train", *given, fails=2))
    assert (tmp_path / "run").read_text() == "mine"


def test_a_loss_that_is_not_a_number(nybble: Nybble, given: tuple[object, ...]) -> None:
    assert "the loss is" in message(nybble("train", *given, "--set", "optim.learning_rate=1e30", fails=2))


def test_a_model_given_as_an_adapter(nybble: Nybble, tiny: Callable[..., Path], tmp_path: Path) -> None:
    said = message(nybble("merge", "--adapter", tiny("llama"), "--output", tmp_path / "m", fails=2))
    assert "holds no adapter" in said


def test_an_unknown_arm(nybble: Nybble, given: tuple[object, ...]) -> None:
    assert "Did you mean 'qlora'?" in message(nybble("compare", *given, "--arms", "lora,qlroa", fails=2))


def test_an_unknown_option_is_a_usage_error(nybble: Nybble) -> None:
    assert "--modle" in nybble("train", "--modle", "x", fails=2).stderr


def _app(error: BaseException) -> typer.Typer:
    app = typer.Typer()

    def verb() -> None:
        raise error

    app.command()(explained(verb))
    return app


def test_out_of_memory_says_what_helps() -> None:
    result = CliRunner().invoke(_app(RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes")), [])
    assert result.exit_code == 2
    assert "train.batch_size" in message(result)


def test_ctrl_c() -> None:
    result = CliRunner().invoke(_app(KeyboardInterrupt("stopped after step 3")), [])
    assert result.exit_code == 130
    assert "Interrupted: stopped after step 3" in result.stderr


def test_a_defect_keeps_its_traceback() -> None:
    result = CliRunner().invoke(_app(ZeroDivisionError("oops")), [])
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)
    assert "report" in result.exception.__notes__[0]


def test_figures_on_stdout_stand_alone_where_there_is_no_terminal(nybble: Nybble, given: tuple[object, ...]) -> None:
    lines = nybble("eval", *given[:4], *SMALL[-2:]).output.splitlines()
    assert [line.split()[0] for line in lines] == ["held-out", "perplexity", "4"]


def test_json_on_stdout_is_nothing_but_json(nybble: Nybble, given: tuple[object, ...]) -> None:
    json.loads(nybble("train", *given, "--json").stdout)


def test_rows_of_no_known_kind(nybble: Nybble, tiny: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"foo": 1}\n{"question": "a", "answer": "b"}\n')
    told = message(nybble("preview", "--model", tiny("llama"), "--data", tmp_path / "rows.jsonl", fails=2))
    assert "rows.jsonl, line 2 has the fields question, answer" in told
    assert told.count("Alpaca (instruction, output)") == 1
