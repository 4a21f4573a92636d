"""A comparison: each arm trains in a process of its own, so that its peak of memory is its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from pathlib import Path

from rich.console import Console

from nybble.compare.single import Arm, ArmFolder, ArmResult, Comparison
from nybble.config import RunConfig
from nybble.data.config import DataConfig
from nybble.data.source import split_files
from nybble.errors import UserError, listed
from nybble.evaluation.held_out import held_out_loss
from nybble.files import check_writable, read_json
from nybble.train.run import run_training


def compare_arms(config: RunConfig, arms: Sequence[Arm], *, replace: bool = False, quiet: bool = False) -> Comparison:
    """Train `config` once for each arm, with its method alone changed, into a folder of the arm's name.

    Arms that an earlier call finished are kept, unfinished ones are resumed; those begun with other settings are an
    error, or with `replace` done anew. Every arm is evaluated on the held-out rows before its first step and after its
    last. A script that calls this needs `if __name__ == "__main__":`, as the processes import it.
    """
    _require_held_out_rows(config.data)
    output = Path(config.output).expanduser()
    check_writable(output)
    configs = {arm: _config_of(config, arm, output) for arm in arms}
    folders = {arm: _folder(arm, own) for arm, own in configs.items()}
    _settle_changes(folders, replace=replace)
    results = [folders[arm].result() or _in_own_process(arm, configs[arm], quiet) for arm in arms]
    return Comparison(output, tuple(results))


def run_arm(arm: Arm, config: RunConfig, quiet: bool = False) -> ArmResult:
    """Run one arm in this process and write its result beside its run."""
    started = time.perf_counter()
    folder = _folder(arm, config)
    resume = _can_resume(folder)
    if folder.begun and not resume:
        shutil.rmtree(folder.path)  # begun by an earlier call that got nowhere
    folder.begin()
    result = _base(config, started) if arm == "base" else _trained(arm, config, started, resume=resume, quiet=quiet)
    folder.finish(result)
    return result


def _require_held_out_rows(data: DataConfig) -> None:
    folder = Path(data.path).expanduser()
    named = data.validation_fraction or data.validation_path or data.validation_split
    if not named and not (folder.is_dir() and split_files(folder, "validation")):
        fix = "Set data.validation_path or data.validation_fraction, or put a valid.jsonl beside train.jsonl."
        raise UserError("holds out no rows to compare arms by", where=data.path, fix=fix)


def _config_of(config: RunConfig, arm: Arm, output: Path) -> RunConfig:
    method = config.method if arm == "base" else arm
    return config.model_copy(update={"method": method, "output": str(output / arm)})


def _folder(arm: Arm, config: RunConfig) -> ArmFolder:
    matters = {"model", "data"} if arm == "base" else set(RunConfig.model_fields) - {"output"}
    # Through JSON, so that it compares equal with what is read back.
    return ArmFolder(Path(config.output), json.loads(config.model_dump_json(include=matters)))


def _settle_changes(folders: Mapping[Arm, ArmFolder], *, replace: bool) -> None:
    changed = {arm: names for arm, folder in folders.items() if (names := folder.changed_settings())}
    if changed and not replace:
        lines = [f"{folders[arm].path}: {', '.join(names)}" for arm, names in changed.items()]
        what = listed("arms were begun with other settings:", lines)
        raise UserError(what, where="compare", fix="Choose another output folder, or remove those.")
    for arm in changed:
        shutil.rmtree(folders[arm].path)


def _can_resume(folder: ArmFolder) -> bool:
    """Whether an earlier call left a checkpoint of an unfinished run."""
    record = folder.path / "run.json"
    if not folder.begun or not any(folder.path.glob("checkpoints/step-*")) or not record.exists():
        return False
    unfinished: bool = read_json(record).get("status") != "finished"
    return unfinished


def _in_own_process(arm: Arm, config: RunConfig, quiet: bool) -> ArmResult:
    Console(stderr=True, quiet=quiet).rule(f"arm {arm}", style="dim", align="left")
    # spawn, not fork: a forked process would begin with this one's memory, and CUDA does not survive a fork.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_end_with_parent) as pool:
        try:
            return pool.submit(run_arm, arm, config, quiet).result()
        except BrokenProcessPool:
            what = "its process was ended from outside, as systems do when memory runs out"
            fix = "Lower train.batch_size or data.max_length, then run the same command again: finished arms are kept."
            raise UserError(what, where=f"arm {arm}", fix=fix) from None
        except KeyboardInterrupt:  # the arm's process got it too, and saves a checkpoint
            raise KeyboardInterrupt(f"run the same command again to go on with arm {arm}") from None


def _end_with_parent() -> None:
    """In an arm's process: once the process that started it is gone, stop as after Ctrl-C, with a checkpoint."""

    def wait(parent: BaseProcess) -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, args=(multiprocessing.parent_process(),), daemon=True).start()


def _trained(arm: Arm, config: RunConfig, started: float, *, resume: bool, quiet: bool) -> ArmResult:
    result = run_training(config, resume=resume, quiet=quiet)
    summary = result.summary
    return ArmResult(
        arm=arm,
        storage=summary["storage"],
        trainable=result.parameters.trainable,
        total=result.parameters.total,
        loss_before=summary["evaluations"][0]["loss"],
        loss_after=summary["best_evaluation"]["loss"],
        tokens_per_second=summary["tokens_per_second"],
        steps=summary["steps"],
        seconds=time.perf_counter() - started,
        peak_host_bytes=summary["peak_host_bytes"],
        peak_device_bytes=_on_device(summary["peak_device_bytes"]),
        disk_bytes=_bytes_in(result.folder),
    )


def _base(config: RunConfig, started: float) -> ArmResult:
    """The model as it is, on the same held-out rows."""
    found = held_out_loss(config.model, config.data, batch_size=config.train.batch_size)
    return ArmResult(
        arm="base",
        storage=found.storage,
        trainable=0,
        total=found.parameters,
        loss_before=found.loss,
        loss_after=found.loss,
        tokens_per_second=found.tokens_per_second,
        steps=0,
        seconds=time.perf_counter() - started,
        peak_host_bytes=found.peak_host_bytes,
        peak_device_bytes=_on_device(found.peak_device_bytes),
        disk_bytes=found.checkpoint_bytes,
    )


def _on_device(peak_bytes: int) -> int | None:
    import torch

    return peak_bytes if torch.cuda.is_available() else None


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
