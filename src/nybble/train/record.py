"""What a run leaves behind in writing: `log.jsonl`, one line a step, and `run.json`, the whole of it at a glance."""

from __future__ import annotations

import contextlib
import json
import platform
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from nybble.config import RunConfig
from nybble.data.prepare import PreparedData
from nybble.errors import UserError
from nybble.files import explain_write_errors, write_json, write_rows, write_text
from nybble.memory.budget import peak
from nybble.models.dtypes import dtype_name
from nybble.models.load import LoadedModel
from nybble.settings import Section
from nybble.train.loop import StepResult
from nybble.train.memory import peak_device_bytes, peak_host_bytes
from nybble.train.processes import rank, world_size
from nybble.train.state import Evaluation, RunState, best_of
from nybble.train.trainable import Trainable
from nybble.versions import installed_versions

LOG = "log.jsonl"

Status = Literal["running", "finished", "interrupted", "failed"]


class RunRecord:
    """The record of one run in its output folder, kept by rank 0.

    `facts` are what is known before the first step (configuration, counts, reports): JSON values or dataclasses of
    them. run.json is rewritten as a whole at each evaluation, at the end and on failure, so it can be read at any time.
    """

    def __init__(self, output: Path, device: torch.device, facts: dict[str, Any]) -> None:
        self.output = output
        self.device = device
        self.facts = {name: _plain(value) for name, value in facts.items()}
        self.steps: list[StepResult] = []
        self.evaluations: list[Evaluation] = []
        self.seconds_before = 0.0  # of the parts of this run that were interrupted
        self.started = time.perf_counter()

    def begin(self, state: RunState, config: RunConfig) -> None:
        """Write what is known before the first step.

        A resumed run takes over what was logged up to its step; later lines belong to steps that will be done again.
        """
        self.evaluations = list(state.evaluations)
        log = self.output / LOG
        evaluated = {evaluation.step for evaluation in state.evaluations}
        kept = [line for line in _read_lines(log) if _is_known(line, state.step, evaluated)]
        self.steps = _steps(kept)
        self.seconds_before = sum(result.seconds for result in self.steps)
        if rank() == 0:
            write_rows(log, kept)
            write_text(self.output / "config.yaml", config.to_yaml())
        self.write("running")

    def finish(self, folder: Path) -> dict[str, Any]:
        """Write run.json for the last time; folder: the result. Returns what it holds."""
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        return self.write("finished", result=folder.name, result_bytes=sum(sizes))

    def step(self, result: StepResult) -> None:
        self.steps.append(result)
        self._log(asdict(result))

    def evaluation(self, evaluation: Evaluation) -> None:
        self.evaluations.append(evaluation)
        self._log({"step": evaluation.step, "eval_loss": evaluation.loss})
        self.write("running")

    def write(self, status: Status, **more: Any) -> dict[str, Any]:
        """Write run.json as it stands, with `more`; returns what it holds."""
        values = self.summary(status) | more
        if rank() == 0:
            write_json(self.output / "run.json", values)
        return values

    @contextlib.contextmanager
    def closed_on_failure(self) -> Iterator[None]:
        """Whatever ends the run early, run.json says so."""
        try:
            yield
        except BaseException as error:
            status: Status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            with contextlib.suppress(UserError):  # the disk may be full; what went wrong first is what counts
                self.write(status, error=str(error) or type(error).__name__)
            raise

    def summary(self, status: Status) -> dict[str, Any]:
        best = best_of(self.evaluations)
        tokens = sum(result.tokens for result in self.steps)
        stepping = sum(result.seconds for result in self.steps)
        return {
            "status": status,
            **self.facts,
            "versions": {"python": platform.python_version(), **installed_versions()},
            "device": describe_device(self.device),
            "processes": world_size(),
            "steps": self.steps[-1].step if self.steps else 0,
            "seconds": self.seconds_before + time.perf_counter() - self.started,
            "step_seconds": stepping,
            "tokens": tokens,
            "target_tokens": sum(result.target_tokens for result in self.steps),
            "tokens_per_second": tokens / stepping if stepping else 0.0,
            # Of steps that another process has done, before this one resumed the run, too.
            "peak_device_bytes": max([peak_device_bytes(self.device), *(step.peak_bytes for step in self.steps)]),
            "device_peak": asdict(peak(self.device)),
            "peak_host_bytes": peak_host_bytes(),
            "losses": [result.loss for result in self.steps],
            "skipped_steps": sum(result.skipped for result in self.steps),
            "evaluations": [asdict(evaluation) for evaluation in self.evaluations],
            "best_evaluation": asdict(best) if best else None,
        }

    def _log(self, line: dict[str, Any]) -> None:
        if rank() != 0:
            return
        with explain_write_errors(self.output), (self.output / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def facts(config: RunConfig, loaded: LoadedModel, trainable: Trainable, data: PreparedData) -> dict[str, Any]:
    """What is known of a run before its first step, for `RunRecord`."""
    parameters = trainable.parameters
    return {
        "config": config,
        "storage": loaded.storage,
        "compute": dtype_name(loaded.compute_dtype),
        "base": {
            "name": loaded.checkpoint.name,
            "fingerprint": loaded.checkpoint.fingerprint,
            "weight_bytes": loaded.weight_bytes,
            "load_seconds": loaded.seconds,
        },
        "parameters": {"trainable": parameters.trainable, "total": parameters.total, "share": parameters.share},
        "adapter": trainable.injection,
        "data": data.report,
        "validation_data": data.validation_report,
    }


def describe_device(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return {"type": "cuda", "name": card.name, "memory_bytes": card.total_memory, "cuda": torch.version.cuda}
    return {"type": device.type, "name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}


def logged_steps(output: Path) -> list[StepResult]:
    """The steps that the log of the run in `output` tells of."""
    return _steps(_read_lines(output / LOG))


def _is_known(line: dict[str, Any], step: int, evaluated: Collection[int]) -> bool:
    """Whether the checkpoint of `step` knows of this line: the run that goes on from there will not log it again.

    The evaluation of its own step may have come after it.
    """
    return line["step"] in evaluated if "eval_loss" in line else line["step"] <= step


def _steps(lines: Iterable[dict[str, Any]]) -> list[StepResult]:
    return [StepResult(**line) for line in lines if "grad_norm" in line]  # others are of evaluations


def _read_lines(log: Path) -> list[dict[str, Any]]:
    """The lines of a log; a run that was killed may have left the last one unfinished."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    whole = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            whole.append(json.loads(line))
    return whole


def _plain(value: Any) -> Any:
    """A dataclass or a section of settings as JSON values; other values as they are."""
    if isinstance(value, Section):
        return value.model_dump(mode="json")
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
