"""What is shown and what is written while a run goes on."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from nybble.config import RunConfig
from nybble.errors import TrainingStopped
from nybble.train.loop import StepResult
from nybble.train.progress import TrainingProgress
from nybble.train.record import RunRecord, logged_steps
from nybble.train.state import Evaluation, RunState

STEP = StepResult(1, 2.5, 40, 0.75, 1e-4, 0.5, 3 * 2**30, tokens=1000)
CONFIG = RunConfig.read(None, {"model.name": "m", "data.path": "d", "output": "o"})


def shown(*, terminal: bool, steps: int = 1, width: int = 200) -> str:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=width, highlight=False)
    with TrainingProgress(100, console=console) as progress:
        for number in range(1, steps + 1):
            progress.step(dataclasses.replace(STEP, step=number, skipped=number == 2))
        progress.evaluation(Evaluation(steps, 1.25))
    return screen.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_all_figures_are_shown(terminal: bool) -> None:
    text = shown(terminal=terminal)
    for figure in ("loss 2.5000", "lr 1.00e-04", "grad norm 0.75", "2.00 k tok/s", "peak 3.00 GiB", "49.5 s left"):
        assert figure in text
    assert "1/100" in text
    assert "step 1/100  held-out loss 1.2500" in text


def test_the_count_of_steps_and_all_figures_fit_into_80_columns() -> None:
    last = shown(terminal=True, width=80).rpartition("held-out")[2]
    assert "1/100" in last
    assert "…" not in last
    assert "tok/s" in last


def test_plain_lines_are_few() -> None:
    """Without a terminal the first steps are shown, then one every ten seconds."""
    lines = shown(terminal=False, steps=50).splitlines()
    assert len(lines) == 4
    assert lines[1].endswith("skipped: fp16 overflow")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_note_has_a_line_of_its_own(terminal: bool) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=200, highlight=False)
    with TrainingProgress(100, console=console) as progress:
        progress.step(dataclasses.replace(STEP, note="note: steps are not run as CUDA graphs: [because]"))
    assert "note: steps are not run as CUDA graphs: [because]" in screen.getvalue()


def test_a_quiet_console_shows_nothing() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, quiet=True)
    with TrainingProgress(1, console=console) as progress:
        progress.step(STEP)
    assert screen.getvalue() == ""


def record_in(folder: Path) -> RunRecord:
    return RunRecord(folder, torch.device("cpu"), {"config": CONFIG})


def test_each_step_is_in_the_log_at_once(tmp_path: Path) -> None:
    record = record_in(tmp_path)
    record.begin(RunState(0, {}), CONFIG)
    record.step(STEP)
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert StepResult(**json.loads(line)) == STEP
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "running"


def test_a_resumed_record_forgets_what_will_be_done_again(tmp_path: Path) -> None:
    record = record_in(tmp_path)
    record.begin(RunState(0, {}), CONFIG)
    for number in (1, 2, 3):
        record.step(dataclasses.replace(STEP, step=number))
        record.evaluation(Evaluation(number, 1 / number))
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 4, "loss": 1.')  # killed in the middle of a line
    resumed = record_in(tmp_path)
    resumed.begin(RunState(2, {}, (Evaluation(1, 1.0), Evaluation(2, 0.5))), CONFIG)
    resumed.step(dataclasses.replace(STEP, step=3))
    values = resumed.write("finished")
    assert values["steps"] == 3
    assert values["losses"] == [2.5] * 3
    assert values["tokens_per_second"] == 2000
    assert values["best_evaluation"] == {"step": 2, "loss": 0.5}
    assert values["seconds"] >= 1.0  # the two steps from before took half a second each
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 1, 2, 2, 3]
    assert [step.step for step in logged_steps(tmp_path)] == [1, 2, 3]


def test_a_failure_is_recorded(tmp_path: Path) -> None:
    record = record_in(tmp_path)
    record.begin(RunState(0, {}), CONFIG)
    with pytest.raises(TrainingStopped), record.closed_on_failure():
        raise TrainingStopped("the loss is nan", where="step 7")
    values = json.loads((tmp_path / "run.json").read_text())
    assert (values["status"], values["error"]) == ("failed", "step 7: the loss is nan")
