"""The record of one run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nybble.compare.folder import Failure, RunFolder, Trained
from nybble.compare.result import MergeResult
from nybble.config import RunConfig
from nybble.data.example import Example, single
from nybble.errors import TrainingDiverged, TrainingStopped, UserError


def settings(**changes: object) -> dict[str, object]:
    given = {"model.name": "m", "data.path": "d", "output": "o"}
    config = RunConfig.read(None, given | {name.replace("__", "."): value for name, value in changes.items()})
    return json.loads(config.model_dump_json(exclude={"output"}))


def test_a_run_is_done_when_its_result_is_there(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "lora", settings())
    assert (folder.begun, folder.trained, folder.in_progress, folder.changed_settings()) == (False, None, False, [])
    folder.begin()
    assert (folder.begun, folder.trained, folder.in_progress) == (True, None, True)
    trained = Trained("nf4", 5, 50, 500, 20, 8, 80, "adapter", predicted_bytes={"step": {"weights": 3}})
    folder.finish_training(trained)
    assert (folder.trained, folder.in_progress) == (trained, False)
    assert folder.merges is None
    folder.finish_merging([merge := MergeResult("original", 1.0, 1.5, 0.25)])
    assert folder.merges == (merge,)


def test_what_rows_gave_before_is_told_of_the_same_rows_alone(tmp_path: Path) -> None:
    def row(target_tokens: int) -> Example:
        return single(torch.arange(9), torch.arange(9) >= 9 - target_tokens, 0)

    folder = RunFolder(tmp_path, settings())
    folder.begin()
    assert folder.sums_before([row(3)]) is None
    folder.note_before([row(3), row(4)], [1.5, 2.5])
    assert folder.sums_before([row(3), row(4)]) == (1.5, 2.5)
    assert folder.sums_before([row(3), row(5)]) is None
    others = [single(torch.arange(9) + 1, torch.arange(9) >= 9 - tokens, 0) for tokens in (3, 4)]
    assert folder.sums_before(others) is None  # as many tokens, but not the same


def test_what_an_earlier_call_got_nowhere_with_is_begun_anew(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, settings())
    folder.begin()
    (tmp_path / "log.jsonl").write_text("half a line")
    folder.begin()
    assert not (tmp_path / "log.jsonl").exists()


def test_changed_settings_are_named(tmp_path: Path) -> None:
    RunFolder(tmp_path, settings()).begin()
    changed = settings(lora__r=9, method="lora")
    assert RunFolder(tmp_path, changed).changed_settings() == ["method", "lora"]


def test_a_setting_that_a_later_version_brings_changes_nothing_if_left_out(tmp_path: Path) -> None:
    before = settings()
    del before["lora"]["lora_alpha"]  # type: ignore[attr-defined]
    RunFolder(tmp_path, before).begin()
    assert RunFolder(tmp_path, settings()).changed_settings() == []
    assert RunFolder(tmp_path, settings(lora__lora_alpha=7)).changed_settings() == ["lora"]


@pytest.mark.parametrize(
    ("error", "lasting"),
    [
        (TrainingDiverged("the loss is nan", where="step 3"), True),
        (TrainingStopped("no memory", where="step 3"), False),
        (UserError("wrong", where="lora", fix="Mend it."), False),
        (ValueError("odd"), False),
    ],
)
def test_only_a_loss_that_is_not_finite_lasts(tmp_path: Path, error: Exception, lasting: bool) -> None:
    folder = RunFolder(tmp_path, settings())
    folder.begin()
    folder.fail(Failure.of(error))
    assert folder.failure is not None
    assert str(error).splitlines()[0] in ("odd", str(folder.failure))
    folder.forgive()
    assert (folder.failure is not None) == lasting


def test_what_an_earlier_call_broke_off_is_not_in_progress_until_it_goes_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "lora", settings())
    folder.forgive()
    assert not folder.begun
    folder.begin()
    folder.forgive()
    assert not folder.in_progress
    folder.begin()
    assert folder.in_progress
