"""A comparison of real arms on a tiny model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nybble.compare.run import compare_arms, run_arm
from nybble.config import RunConfig
from nybble.errors import UserError
from nybble.evaluation.held_out import held_out_loss


@pytest.fixture
def config(tiny: Callable[..., Path], tmp_path: Path) -> RunConfig:
    data = tmp_path / "data"
    data.mkdir()
    for name, count in (("train", 8), ("valid", 3)):
        rows = [{"prompt": f"What is {name} {i}?", "completion": f"It is the number {i}."} for i in range(count)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model.name": str(tiny("smollm", dtype="bfloat16")),
        "data.path": str(data),
        "data.max_length": 64,
        "output": str(tmp_path / "out"),
        "train.max_steps": 2,
        "optim.learning_rate": 0.01,
    }
    return RunConfig.read(None, settings)


def arm_config(config: RunConfig, arm: str) -> RunConfig:
    return config.model_copy(update={"output": f"{config.output}/{arm}", "method": "lora" if arm == "base" else arm})


def test_every_arm_is_measured_on_the_same_rows(config: RunConfig) -> None:
    found = {arm: run_arm(arm, arm_config(config, arm), quiet=True) for arm in ("base", "lora", "qlora", "full")}
    assert found["base"].loss_after == found["lora"].loss_before  # the same weights, storage and rows
    assert found["qlora"].loss_before != found["base"].loss_after  # NF4
    assert found["full"].loss_before == pytest.approx(found["base"].loss_after, rel=1e-6)
    assert [found[arm].storage for arm in found] == ["bf16", "bf16", "nf4", "fp32"]
    assert found["base"].trainable == 0 < found["lora"].trainable == found["qlora"].trainable
    assert found["full"].trainable == found["full"].total == found["base"].total
    assert found["lora"].total == found["base"].total + found["lora"].trainable
    assert all(result.steps == 2 for arm, result in found.items() if arm != "base")
    assert all(result.loss_after < result.loss_before for arm, result in found.items() if arm != "base")


def test_disk_bytes_are_those_of_what_was_written(config: RunConfig) -> None:
    result = run_arm("lora", arm_config(config, "lora"), quiet=True)
    file = Path(config.output) / "lora" / "adapter" / "adapter_model.safetensors"
    assert result.disk_bytes == file.stat().st_size > 4 * result.trainable


def test_arms_run_in_processes_of_their_own_and_finished_ones_are_kept(config: RunConfig) -> None:
    first = compare_arms(config, ["lora"], quiet=True)
    log = Path(config.output) / "lora" / "log.jsonl"
    written = log.stat().st_mtime_ns
    assert compare_arms(config, ["lora"], quiet=True).arms == first.arms
    assert log.stat().st_mtime_ns == written


def test_an_arm_ends_with_the_process_that_started_it(config: RunConfig, tmp_path: Path) -> None:
    longer = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 100_000})})
    (tmp_path / "long.yaml").write_text(longer.to_yaml())
    script = (
        "from pathlib import Path; from nybble.compare.run import compare_arms; from nybble.config import RunConfig\n"
        f"compare_arms(RunConfig.read(Path({str(tmp_path / 'long.yaml')!r}), {{}}), ['lora'], quiet=True)"
    )
    folder = Path(config.output) / "lora"
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL) as parent:
        _wait_until(lambda: (folder / "log.jsonl").exists() and (folder / "log.jsonl").stat().st_size > 0)
        parent.kill()
    _wait_until(lambda: json.loads((folder / "run.json").read_text())["status"] == "interrupted")
    assert list(folder.glob("checkpoints/step-*"))


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_other_settings_are_refused_or_replace(config: RunConfig) -> None:
    before = run_arm("base", arm_config(config, "base"), quiet=True)
    assert compare_arms(_with_rank(config, 4), ["base"], quiet=True).arms == (before,)  # which has no adapter
    other_data = config.model_copy(update={"data": config.data.model_copy(update={"max_length": 48})})
    with pytest.raises(UserError, match="base: data"):
        compare_arms(other_data, ["base"], quiet=True)
    record = Path(config.output) / "base" / "arm.json"
    assert json.loads(record.read_text())["result"]["seconds"] == before.seconds
    compare_arms(other_data, ["base"], replace=True, quiet=True)
    assert json.loads(record.read_text())["settings"]["data"]["max_length"] == 48


def test_another_rank_is_another_arm(config: RunConfig) -> None:
    run_arm("lora", arm_config(config, "lora"), quiet=True)
    with pytest.raises(UserError, match="lora: lora"):
        compare_arms(_with_rank(config, 4), ["lora"], quiet=True)


def _with_rank(config: RunConfig, r: int) -> RunConfig:
    return config.model_copy(update={"lora": config.lora.model_copy(update={"r": r})})


def test_an_unfinished_arm_goes_on_from_its_checkpoint(config: RunConfig) -> None:
    own = arm_config(config, "lora")
    whole = run_arm("lora", own, quiet=True)
    folder = Path(own.output)
    halfway = own.model_copy(update={"train": own.train.model_copy(update={"save_every": 1})})
    shutil.rmtree(folder)
    run_arm("lora", halfway, quiet=True)
    first_step = (folder / "log.jsonl").read_text().splitlines()[1]
    _undo_second_step(folder)
    assert run_arm("lora", halfway, quiet=True).loss_after == whole.loss_after
    assert (folder / "log.jsonl").read_text().splitlines()[1] == first_step  # its seconds too: it was not done again
    assert [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()] == [0, 1, 2, 2]


def _undo_second_step(folder: Path) -> None:
    """As if the run had been killed after its first step."""
    shutil.rmtree(folder / "checkpoints" / "step-000002")
    shutil.rmtree(folder / "adapter")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": "running"}))
    arm = json.loads((folder / "arm.json").read_text())
    (folder / "arm.json").write_text(json.dumps({"settings": arm["settings"]}))


def test_an_error_in_an_arm_is_told_as_it_was(config: RunConfig) -> None:
    nowhere = config.model_copy(update={"model": config.model.model_copy(update={"name": config.data.path})})
    with pytest.raises(UserError, match=r"no config\.json") as caught:
        compare_arms(nowhere, ["lora"], quiet=True)
    assert caught.value.where == config.data.path


def test_arms_need_held_out_rows(config: RunConfig) -> None:
    (Path(config.data.path) / "valid.jsonl").unlink()
    with pytest.raises(UserError, match="holds out no rows"):
        compare_arms(config, ["lora"], quiet=True)


def test_held_out_loss_takes_all_rows_where_none_is_held_out(config: RunConfig) -> None:
    assert held_out_loss(config.model, config.data).rows == 3
    (Path(config.data.path) / "valid.jsonl").unlink()
    assert held_out_loss(config.model, config.data).rows == 8
