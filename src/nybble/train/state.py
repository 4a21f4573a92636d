"""Checkpoints of a run: weights, optimizer and place, whole or not there at all, and resumed from to the bit.

A checkpoint is a folder `step-000100` that holds the trained weights, `optimizer-*.safetensors` and `state.json`,
which lists every other file with its size and SHA-256. Nothing is pickled. There is no random state to save: the
randomness of a step follows from seed, rank and step.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.tensor import DTensor

from nybble.errors import UserError, listed
from nybble.files import atomic_folder, read_json, write_json
from nybble.sharded import sharded_like
from nybble.train.processes import rank, wait_for_all
from nybble.train.tensors import read_tensors, write_tensors

STATE_FILE = "state.json"


class Weights(Protocol):
    """What a run trains. Every process calls these; rank 0 writes, into a folder that is there."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Evaluation:
    step: int
    loss: float


@dataclass(frozen=True)
class RunState:
    """Where a run stands. settings: flat names to values of all that decides its numbers; compared on resuming."""

    step: int
    settings: dict[str, Any]
    evaluations: tuple[Evaluation, ...] = ()

    @property
    def best(self) -> Evaluation | None:
        return best_of(self.evaluations)


def best_of(evaluations: Iterable[Evaluation]) -> Evaluation | None:
    """The evaluation with the lowest loss after training began, the earliest of equal ones; none without a number."""
    trained = (found for found in evaluations if found.step > 0 and math.isfinite(found.loss))
    return min(trained, key=lambda evaluation: evaluation.loss, default=None)


@dataclass(frozen=True)
class Training:
    """What a checkpoint captures. module: whose parameter names the optimizer's state goes by."""

    weights: Weights
    module: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: GradScaler | None = None


def save_checkpoint(folder: Path, training: Training, state: RunState, *, keep: int) -> Path:
    """Write `folder/step-<state.step>`, then remove all checkpoints but the `keep` newest and the best one."""
    target = folder / checkpoint_name(state.step)
    with atomic_folder(target, replace=True) if rank() == 0 else contextlib.nullcontext(target) as aside:
        training.weights.save(aside)
        write_tensors(aside, "optimizer", _optimizer_tensors(training))
        if rank() == 0:
            scaler = training.scaler.state_dict() if training.scaler else None
            write_json(aside / STATE_FILE, asdict(state) | {"scaler": scaler, "files": _describe_files(aside)})
    if rank() == 0:
        _prune(folder, state, keep)
    wait_for_all()
    return target


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in `folder` and, for each newer one that is broken, what is wrong with it."""
    broken: list[str] = []
    for candidate in reversed(_checkpoints(folder)):
        problem = _what_is_wrong(candidate)
        if problem is None:
            return candidate, broken
        broken.append(f"{candidate}: {problem}")
    return None, broken


def read_state(checkpoint: Path) -> RunState:
    values = read_json(checkpoint / STATE_FILE)
    evaluations = tuple(Evaluation(**evaluation) for evaluation in values["evaluations"])
    return RunState(step=values["step"], settings=values["settings"], evaluations=evaluations)


def restore(checkpoint: Path, training: Training) -> None:
    """Put weights, optimizer and loss scale back as they were when `checkpoint` was written."""
    training.weights.load(checkpoint)
    _restore_optimizer(checkpoint, training)
    scaler = read_json(checkpoint / STATE_FILE)["scaler"]
    if training.scaler is not None and scaler is not None:
        training.scaler.load_state_dict(scaler)


def check_same_settings(saved: RunState, settings: dict[str, Any], *, where: Path) -> None:
    """Raise a UserError that lists every setting which would make the run go on differently."""
    names = sorted(saved.settings.keys() | settings.keys())
    changed = [
        f"{name} was {saved.settings.get(name)!r} and is {settings.get(name)!r}"
        for name in names
        if saved.settings.get(name) != settings.get(name)
    ]
    if changed:
        what = listed("the run cannot be resumed, because settings that alter it have changed:", changed)
        raise UserError(what, where=where, fix="Set them back, or start anew in another output folder.")


def _optimizer_tensors(training: Training) -> Iterator[tuple[str, Tensor]]:
    """`name/key` and value, in the order of the module's parameters, which is the same on every process."""
    for name, parameter in training.module.named_parameters():
        for key, value in sorted(training.optimizer.state.get(parameter, {}).items()):
            yield f"{name}/{key}", value


def _restore_optimizer(checkpoint: Path, training: Training) -> None:
    values = training.optimizer.state_dict()
    parameters = [p for group in training.optimizer.param_groups for p in group["params"]]
    index = {parameter: number for number, parameter in enumerate(parameters)}
    named = dict(training.module.named_parameters())
    state: dict[int, dict[str, Tensor]] = {}
    for path, value in read_tensors(checkpoint, "optimizer"):
        name, key = path.rsplit("/", 1)
        parameter = named[name]
        # Moments are split over processes as their parameter is; the rest the optimizer places itself.
        split = isinstance(parameter, DTensor) and value.dim() > 0
        state.setdefault(index[parameter], {})[key] = sharded_like(value, parameter) if split else value
    training.optimizer.load_state_dict(values | {"state": state})


def _checkpoints(folder: Path) -> list[Path]:
    named = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(named, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _prune(folder: Path, state: RunState, keep: int) -> None:
    # Broken ones from a later step, which a resumed run has skipped, are left until it replaces them.
    written = [path for path in _checkpoints(folder) if _step_of(path) <= state.step]
    best = state.best.step if state.best else None
    for path in written[:-keep]:
        if _step_of(path) != best:
            shutil.rmtree(path)
    for leftover in [*folder.glob(".step-*.partial-*"), *folder.glob(".step-*.old-*")]:
        shutil.rmtree(leftover, ignore_errors=True)  # of runs that were killed


def _describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _what_is_wrong(checkpoint: Path) -> str | None:
    try:
        files = read_json(checkpoint / STATE_FILE)["files"]
    except (UserError, KeyError, TypeError) as error:
        return f"{STATE_FILE} cannot be read ({error})"
    for name, described in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != described["bytes"] or _sha256(file) != described["sha256"]:
            return f"{name} is not as it was written"
    return None
