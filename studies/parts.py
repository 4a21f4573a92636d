"""A part of the study on this machine: its rows, its settings, the jobs it is done by, and what is kept of it.

A part is a comparison of `nybble.compare` in a folder of its own below the work folder. An arm is a job, so that parts
spread over GPUs. What is kept is one JSON a part: the comparison, and the record of every run, from which a machine
that never saw the work folder goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grid import MARGIN, SEQ_LEN, Part
from jobs import Job
from results import origin

from nybble.calibrate.run import Calibration
from nybble.compare.assemble import assemble, this_machine
from nybble.compare.config import Arm, CompareConfig
from nybble.compare.folder import FILE as RECORD
from nybble.compare.layout import Layout
from nybble.compare.result import Comparison, Machine
from nybble.compare.run import settle_changes
from nybble.compare.statement import FILE as STATEMENT
from nybble.compare.statement import state
from nybble.compare.worker import by_base, run_arms
from nybble.config import RunConfig
from nybble.demo.docstrings import docstring_rows
from nybble.demo.library_text import library_text
from nybble.demo.splits import Splits
from nybble.demo.word_tasks import word_tasks
from nybble.export.quantized import quantize_checkpoint
from nybble.files import check_writable, read_json, write_json, write_text
from nybble.models.checkpoint import Checkpoint
from nybble.models.dtypes import resolve_device
from nybble.quant.format import NF4Spec

KINDS: dict[str, Callable[[], Splits]] = {
    "text": library_text,
    "docstrings": docstring_rows,
    "words": lambda: word_tasks(train=8000),
}
NO_LIMIT_S = 86_400  # of a job: the call has one
CALIBRATION_TOKENS = 262_144  # at most, of a kind's training rows, which are no arm's held-out rows


def model_folder(work: Path) -> Path:
    return work / "model"


def prepared_folder(work: Path, kind: str) -> Path:
    return work / "prepared" / kind


def write_data(part: Part, work: Path) -> Path:
    """The rows of a part, with as many held-out ones as it wants; the first ones are a fair sample."""
    data = part.data
    folder = work / "data" / f"{data.kind}-{data.validation_rows}-{data.test_rows}"
    if not (folder / "test.jsonl").exists():  # the last file that is written
        splits = KINDS[data.kind]()
        held = splits.validation[: data.validation_rows], splits.test[: data.test_rows]
        Splits(splits.train, *held).write(folder)
    return folder


def prepare_base(work: Path, kind: str, tokens: int) -> dict[str, Any]:
    """Write the prepared base of a kind: compensated NF4 codes by its training rows, and corrections beside them."""
    source = Checkpoint.open(str(model_folder(work)))
    folder = work / "data" / f"calibration-{kind}"
    Splits(KINDS[kind]().train, [], []).write(folder)
    calibration = Calibration.read(str(folder / "train.jsonl"), source, tokens=tokens)
    began = time.perf_counter()
    report = quantize_checkpoint(
        source,
        prepared_folder(work, kind),
        NF4Spec(),
        device=resolve_device(),
        rounding="compensated",
        calibration=calibration,
    )
    seconds = time.perf_counter() - began
    return {"tokens": calibration.text.tokens, "seconds": seconds, "bits_per_weight": report.bits_per_weight}


def find_machine() -> dict[str, Any]:
    """For a process of its own: one that has asked for its GPU takes memory that the jobs there count as theirs."""
    return {"machine": this_machine()}


def layout_of(part: Part, work: Path) -> Layout:
    """The part as a comparison."""
    data, output = part.data, work / part.name
    shared = RunConfig.read(
        None,
        {
            "model.name": str(model_folder(work)),
            "data.path": str(write_data(part, work)),
            "data.max_length": SEQ_LEN,
            "data.packing": True,
            "output": str(output),
            "lora.r": part.r,
            "lora.lora_alpha": 2 * part.r,
            "lora.target_modules": part.targets,
            "train.max_steps": data.steps,
            "train.batch_size": data.batch_size,
        },
    )
    arms = [arm_of(name, dict(settings)) for name, settings in part.arms.items()]
    compare = CompareConfig(
        arms=tuple(arms),
        seeds=part.seeds,
        learning_rates=part.rates,
        reference="lora",
        margin=MARGIN,
        samples=data.questions,
        sample_tokens=data.answer_tokens,
        merge=part.merge,
    )
    return Layout(shared, compare, output)


def arm_of(name: str, settings: dict[str, Any]) -> Arm:
    rates = settings.pop("learning_rates", ())
    return Arm(name=name, overrides=settings, learning_rates=rates)


def jobs_of(part: Part, layout: Layout) -> list[Job]:
    """What is left to do, an arm a job; failures that need not happen again are forgotten."""
    for run in layout.all_runs():
        run.folder.forgive()
    return [
        Job(f"{part.name}: {arm.name}", train, (layout, arm), NO_LIMIT_S) for arms in by_base(layout) for arm in arms
    ]


def train(layout: Layout, arm: Arm) -> dict[str, Any]:
    """In a process of its own: every run of the arm, whose results are in their folders."""
    write_text(layout.output / "config.yaml", layout.shared.to_yaml())
    began = time.perf_counter()
    run_arms(layout, [arm], quiet=True)
    return {"device": origin()["device"], "seconds": time.perf_counter() - began}


def begin(layout: Layout, kept: Path) -> None:
    """Lay the rule down, or hold to that of an earlier call; finished runs come back from what was kept of them.

    Raises UserError where that rule, or the settings that runs were begun with, were others.
    """
    check_writable(layout.output)
    if kept.exists():
        _restore(layout, read_json(kept))
    settle_changes(layout)
    state(layout)


def keep(layout: Layout, kept: Path, machine: Machine) -> Comparison:
    """Write all that is known of a part by now."""
    statement = state(layout)
    comparison = assemble(layout, statement, machine=machine)
    figures = comparison.figures()
    for arm in figures["arms"]:
        for run in arm["runs"]:
            del run["curve"], run["sequence_losses"]  # they are in the records
    records = {
        str(run.folder.path.relative_to(layout.output)): read_json(run.folder.path / RECORD)
        for run in layout.all_runs()
        if run.folder.begun
    }
    kept.parent.mkdir(parents=True, exist_ok=True)
    values = {**origin(comparison.machine.name), "statement": asdict(statement)}
    values |= {"comparison": figures, "records": records}
    write_text(kept, json.dumps(_rounded(values), separators=(",", ":")) + "\n")
    return comparison


def _restore(layout: Layout, values: dict[str, Any]) -> None:
    """Put finished runs where this machine has none; those that were broken off lack their checkpoints, and go."""
    if not (layout.output / STATEMENT).exists():
        write_json(layout.output / STATEMENT, values["statement"])
    known = _complete(values["records"])
    for run in layout.all_runs():
        record = known.get(str(run.folder.path.relative_to(layout.output)))
        if record is None or run.folder.begun:
            continue
        lacks_merge = record.get("measured") and layout.merges(run) and record.get("merges") is None
        if run.config.model.name != layout.shared.model.name:
            # Prepared again on this machine, where sums are rounded otherwise: some of its codes are others.
            record["contents"].pop("base weights", None)
        if not lacks_merge:
            check_writable(run.folder.path)
            write_json(run.folder.path / RECORD, record)


def _complete(records: dict[str, Any]) -> dict[str, Any]:
    """Records that need nothing else of their folders: of measured runs, and of learning rates that were not chosen."""
    measured = {name for name, record in records.items() if record.get("measured")}
    chosen = {name.rpartition("/")[0] for name in measured}
    settled = {folder.partition("/")[0] for folder in chosen}
    lost = {
        name
        for name, record in records.items()
        if record.get("trained") and name.partition("/")[0] in settled and name.rpartition("/")[0] not in chosen
    }
    return {name: records[name] for name in sorted(measured | lost)}


def _rounded(value: Any) -> Any:
    """Nine digits: as many as a number in fp32 has, at half the size."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
