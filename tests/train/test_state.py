"""Checkpoints: resumed runs give the same bits, broken ones are passed over, killed runs leave a good one."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nybble.config import RunConfig
from nybble.errors import UserError
from nybble.train.interrupt import TrainingInterrupted
from nybble.train.run import RunResult, run_training
from nybble.train.state import Evaluation, best_of, newest_checkpoint, read_state

HARD = {
    "lora.lora_dropout": 0.3,
    "lora.use_dora": True,
    "lora.lora_alpha": 12,
    "optim.weight_decay": 0.1,
    "data.packing": True,
    "data.max_length": 80,
    "data.validation_fraction": 0.2,
    "train.gradient_accumulation": 2,
    "train.batch_size": 1,
}


def weights_of(result: RunResult) -> dict[str, torch.Tensor]:
    files = sorted(result.folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(a: RunResult, b: RunResult) -> None:
    assert a.losses == b.losses
    ours, theirs = weights_of(a), weights_of(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def cut_off(output: Path, copy: Path, step: int) -> None:
    """What is left of the run in `output` had it been killed some time after the checkpoint of `step`."""
    shutil.copytree(output, copy)
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    for name in ("adapter", "model"):
        shutil.rmtree(copy / name, ignore_errors=True)
    record = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(record | {"status": "running"}))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2", HARD | {"method": "qlora"}),
        ("smollm", HARD | {"method": "full", "lora.use_dora": False, "optim.learning_rate": 1e-3}),
        ("smollm", HARD | {"lora.dtype": "bf16", "optim.learning_rate": 0.05}),  # moments in another dtype
        ("smollm", HARD | {"optim.state_bits": 8}),
    ],
)
def test_resumed_equals_uninterrupted(
    settings: Callable[..., RunConfig], tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    """Six steps at once, and three and three: with dropout, packing, accumulation, and evaluation in between."""
    often = {"train.save_every": 3, "train.eval_every": 2, "train.keep_checkpoints": 9}
    straight = run_training(settings(kind, **changes, **often), quiet=True)
    cut_off(straight.output, tmp_path / "cut", 3)
    resumed = run_training(settings(kind, **changes, **often, output=str(tmp_path / "cut")), resume=True, quiet=True)
    assert_same(straight, resumed)
    assert straight.summary["evaluations"] == resumed.summary["evaluations"]
    log = [json.loads(line) for line in (resumed.output / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4, 5, 6]
    untouched = run_training(settings(kind, **changes, output=str(tmp_path / "plain")), quiet=True)
    assert untouched.losses == straight.losses  # neither saving nor evaluating alters a run


def test_resuming_without_what_was_saved_would_differ(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    """The test above can fail: without the optimizer's moments the same three steps lead elsewhere."""
    often = HARD | {"train.save_every": 3, "train.keep_checkpoints": 9}
    straight = run_training(settings(**often), quiet=True)
    cut_off(straight.output, tmp_path / "cut", 3)
    checkpoint = tmp_path / "cut" / "checkpoints" / "step-000003"
    (moments,) = checkpoint.glob("optimizer-*.safetensors")
    state = json.loads((checkpoint / "state.json").read_text())
    del state["files"][moments.name]
    (checkpoint / "state.json").write_text(json.dumps(state))
    moments.unlink()
    resumed = run_training(settings(**often, output=str(tmp_path / "cut")), resume=True, quiet=True)
    assert straight.losses[:4] == resumed.losses[:4]
    assert straight.losses[4:] != resumed.losses[4:]


def test_a_run_killed_before_its_result_was_saved_is_completed(
    settings: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """All steps are done and in a checkpoint; only the adapter is missing."""
    straight = run_training(settings(), quiet=True)
    cut_off(straight.output, tmp_path / "cut", 6)
    assert not (tmp_path / "cut" / "adapter").exists()
    assert_same(run_training(settings(output=str(tmp_path / "cut")), resume=True, quiet=True), straight)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "state"])
def test_a_broken_checkpoint_is_passed_over(
    settings: Callable[..., RunConfig], tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    often = {"train.save_every": 2, "train.keep_checkpoints": 9}
    straight = run_training(settings(**often), quiet=True)
    cut_off(straight.output, tmp_path / "cut", 4)
    newest = tmp_path / "cut" / "checkpoints" / "step-000004"
    _damage(newest, damage)
    found, notes = newest_checkpoint(newest.parent)
    assert found == newest.with_name("step-000002")
    assert len(notes) == 1
    capsys.readouterr()
    resumed = run_training(settings(**often, output=str(tmp_path / "cut")), resume=True)
    assert "skipped a broken checkpoint" in capsys.readouterr().err
    assert_same(straight, resumed)


def _damage(checkpoint: Path, how: str) -> None:
    file = checkpoint / ("state.json" if how == "state" else "optimizer-00001.safetensors")
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "flipped":
        content[-5] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2])


def test_changed_settings_are_listed(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    run_training(settings(**{"train.save_every": 3}), quiet=True)
    cut_off(tmp_path / "out", tmp_path / "cut", 3)
    changed = {"lora.r": 8, "optim.learning_rate": 0.5, "train.save_every": 1, "output": str(tmp_path / "cut")}
    with pytest.raises(
        UserError, match=r"lora\.r was 4 and is 8\n  optim\.learning_rate was 0\.01 and is 0\.5"
    ) as error:
        run_training(settings(**changed), resume=True, quiet=True)
    assert "save_every" not in str(error.value)


def test_a_loss_that_is_no_number_is_never_the_best() -> None:
    found = [Evaluation(0, 1.0), Evaluation(1, math.nan), Evaluation(2, 3.0), Evaluation(3, 2.0)]
    assert best_of(found) == found[3]
    assert best_of(found[:2]) is None


def test_other_held_out_rows_are_refused_and_the_same_ones_elsewhere_are_not(
    settings: Callable[..., RunConfig], chats: Path, tmp_path: Path
) -> None:
    """Losses of two sets cannot be compared, so none of them would be the best."""
    rows = chats.read_text(encoding="utf-8").splitlines(keepends=True)
    for name, part in (("some", rows[:4]), ("moved", rows[:4]), ("others", rows[4:8])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")

    def held_out(name: str, output: str) -> RunConfig:
        place = {"data.validation_path": str(tmp_path / f"{name}.jsonl"), "output": str(tmp_path / output)}
        return settings(**{"train.save_every": 3} | place)

    straight = run_training(held_out("some", "out"), quiet=True)
    cut_off(tmp_path / "out", tmp_path / "cut", 3)
    with pytest.raises(UserError, match="settings that alter it have changed:\n  held-out tokens was"):
        run_training(held_out("others", "cut"), resume=True, quiet=True)
    assert_same(run_training(held_out("moved", "cut"), resume=True, quiet=True), straight)


def test_an_evaluation_that_is_made_again_is_logged_once(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    """The last step's checkpoint was written before its evaluation, and the run was killed before its result was."""
    changes = {"data.validation_fraction": 0.2, "train.save_every": 6}
    straight = run_training(settings(**changes), quiet=True)
    cut_off(tmp_path / "out", tmp_path / "cut", 6)
    resumed = run_training(settings(**changes, output=str(tmp_path / "cut")), resume=True, quiet=True)
    assert [step for step, _ in _logged_losses(straight)] == [0, 6]
    assert _logged_losses(resumed) == _logged_losses(straight)
    assert_same(resumed, straight)


def _logged_losses(result: RunResult) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (result.output / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]


def test_the_newest_and_the_best_are_kept(settings: Callable[..., RunConfig]) -> None:
    """A ruinous rate makes the first evaluation the best: its checkpoint stays, and it is the result."""
    ruinous = {"data.validation_fraction": 0.2, "optim.schedule": "constant", "optim.learning_rate": 1.0}
    cadence = {"train.eval_every": 1, "train.save_every": 1, "train.max_steps": 3, "train.keep_checkpoints": 1}
    result = run_training(settings(**ruinous, **cadence), quiet=True)
    assert result.summary["best_evaluation"]["step"] == 1
    kept = sorted(path.name for path in (result.output / "checkpoints").iterdir())
    assert kept == ["step-000001", "step-000003"]
    saved = load_file(result.output / "checkpoints" / "step-000001" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in weights_of(result).items())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(settings: Callable[..., RunConfig], tmp_path: Path, number: signal.Signals) -> None:
    """The step in progress is done and saved; resumed, the run ends as if nothing had happened."""
    changes = {"train.max_steps": 30, "lora.lora_dropout": 0.2, "train.batch_size": 1}
    handler = signal.getsignal(number)
    watcher = threading.Thread(target=_send_when_running, args=(tmp_path / "out" / "log.jsonl", number))
    watcher.start()
    with pytest.raises(TrainingInterrupted) as stopped:
        run_training(settings(**changes), quiet=True)
    watcher.join()
    assert signal.getsignal(number) == handler
    assert stopped.value.checkpoint == tmp_path / "out" / "checkpoints" / f"step-{stopped.value.step:06d}"
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "interrupted"
    resumed = run_training(settings(**changes), resume=True, quiet=True)
    straight = run_training(settings(**changes, output=str(tmp_path / "straight")), quiet=True)
    assert_same(resumed, straight)


def _send_when_running(log: Path, number: signal.Signals) -> None:
    for _ in range(30_000):
        if log.exists() and len(log.read_bytes().splitlines()) > 1:
            os.kill(os.getpid(), number)
            return
        time.sleep(0.001)


def test_a_run_killed_while_saving_leaves_a_good_checkpoint(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = settings(**{"train.save_every": 1, "train.max_steps": 2000, "train.keep_checkpoints": 3})
    child = multiprocessing.get_context("spawn").Process(target=run_training, args=(config,), kwargs={"quiet": True})
    child.start()
    checkpoints = tmp_path / "out" / "checkpoints"
    deadline = time.monotonic() + 60
    while child.is_alive() and time.monotonic() < deadline and not _is_saving(checkpoints, after_step=4):
        pass
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    found, _ = newest_checkpoint(checkpoints)
    assert found is not None
    assert len(load_file(found / "adapter" / "adapter_model.safetensors")) == 28
    assert read_state(found).step >= 4


def _is_saving(checkpoints: Path, *, after_step: int) -> bool:
    steps = [int(path.name.split(".")[1].removeprefix("step-")) for path in checkpoints.glob(".step-*.partial-*")]
    return any(step > after_step for step in steps)
