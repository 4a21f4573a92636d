"""Settings from files and the command line, and what is said of wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from nybble.config import RunConfig, parse_assignment
from nybble.errors import UserError

GIVEN = {"model.name": "m", "data.path": "d", "output": "o"}


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {name: m}\ndata: {path: d}\noutput: o\nlora: {r: 4, lora_alpha: 8}\n")
    config = RunConfig.read(file, {"lora.r": 64})
    assert (config.lora.r, config.lora.lora_alpha) == (64, 8)


def test_a_run_survives_its_yaml(tmp_path: Path) -> None:
    config = RunConfig.read(None, GIVEN | {"lora.target_modules": ["q_proj"], "optim.betas": [0.8, 0.9]})
    file = tmp_path / "run.yaml"
    file.write_text(config.to_yaml())
    assert RunConfig.read(file, {}) == config


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lora.alhpa", 8, "lora has no setting 'alhpa'; did you mean 'lora_alpha'"),
        ("lora.alpha", 8, "did you mean 'lora_alpha'"),
        ("optim.lr", 1e-4, "did you mean 'learning_rate'"),
        ("lora.rank", 8, "lora has no setting 'rank'; did you mean 'lora.r'"),
        ("train.learning_rate", 1e-4, "train has no setting 'learning_rate'; did you mean 'optim.learning_rate'"),
        ("learning_rate", 1e-4, "did you mean 'optim.learning_rate'"),
        ("trian.seed", 1, "has no setting 'trian'; did you mean 'train'"),
        ("lora.r", 0, "lora.r: .* greater than or equal to 1"),
        ("optim.betas", [1.5, 0.9], "optim.betas.*less than 1"),
        ("optim.betas", [0.9, -1], "optim.betas.*greater than or equal to 0"),
        ("memory.budget", "0GiB", "memory.budget: .*more than nothing"),
        ("method", "qlra", "method: .*'qlora'"),
        ("optim.learning_rate", "fast", "optim.learning_rate: .*number"),
        ("train.epochs", "inf", "train.epochs: .*finite"),
        ("memory.budget", 8, "memory.budget: '8' is no amount of memory; write it like 24GiB"),
        ("model.revision", 1.0, "model.revision: must be text, in quotes"),
        ("model.block_size", 60, "model.block_size: .* 32, 64, 128"),
        ("model.name", "", "model.name: is empty"),
        ("data.path", "", "data.path: is empty"),
        ("output", "", "output: is empty"),
        ("train.trackers", "wandb", r"train.trackers: must be a list, like \[a, b\]"),
        ("lora", 8, "lora: is a section with settings of its own"),
    ],
)
def test_wrong_settings(name: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RunConfig.read(None, GIVEN | {name: value})


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(UserError) as caught:
        RunConfig.read(None, {"lora.r": 0, "train.batch": 3})
    told = str(caught.value)
    assert all(word in told for word in ("lora.r", "batch_size", "model", "data", "output"))


def test_files_that_hold_no_settings(tmp_path: Path) -> None:
    for text, message in (("- a\n", "must hold settings"), ("a: [", "not valid YAML")):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            RunConfig.read(tmp_path / "run.yaml", {})
    with pytest.raises(UserError, match="no such file"):
        RunConfig.read(tmp_path / "absent.yaml", {})
    with pytest.raises(UserError, match="is a folder"):
        RunConfig.read(tmp_path, {})


def test_assignments() -> None:
    assert parse_assignment("lora.r=8") == ("lora.r", 8)
    assert parse_assignment("lora.target_modules=[q_proj, v_proj]") == ("lora.target_modules", ["q_proj", "v_proj"])
    assert parse_assignment("data.path=a=b") == ("data.path", "a=b")
    for text in ("lora.r", "=8"):
        with pytest.raises(UserError, match="is not a setting"):
            parse_assignment(text)
    with pytest.raises(UserError, match="is not a section"):
        RunConfig.read(None, GIVEN | {"output.x": 1})


def test_changed_settings_leave_the_others_as_they_were_given() -> None:
    config = RunConfig.read(None, {"model.name": "m", "data.path": "d", "output": "o", "train.batch_size": 8})
    changed = config.changed({"train.gradient_accumulation": 2, "method": "lora"})
    assert (changed.train.batch_size, changed.train.gradient_accumulation, changed.method) == (8, 2, "lora")
    assert changed.model_fields_set == config.model_fields_set | {"method"}
    with pytest.raises(UserError, match="no setting 'batch'"):
        config.changed({"train.batch": 2})
