"""A training run from settings to a saved adapter or model."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch.amp.grad_scaler import GradScaler

from nybble.adapters.report import ParameterCounts
from nybble.config import RunConfig
from nybble.data.prepare import PreparedData
from nybble.files import require_writable_file
from nybble.memory.budget import expand_segments
from nybble.models.checkpoint import Checkpoint
from nybble.models.device import compute_device
from nybble.models.dtypes import dtype_name
from nybble.models.load import LoadedModel, load_tokenizer
from nybble.models.loss import CausalLMLoss
from nybble.optim.adamw import build_optimizer, check_state_bits
from nybble.train.cadence import Run
from nybble.train.card import card_within
from nybble.train.course import Course
from nybble.train.determinism import deterministic_kernels
from nybble.train.distributed import shard_or_replicate
from nybble.train.fuse import check_precision, make_loss, rows_of
from nybble.train.identity import run_settings
from nybble.train.interrupt import StopSignals
from nybble.train.memory import reset_peak
from nybble.train.out_of_memory import explain_out_of_memory
from nybble.train.output import claim_output
from nybble.train.plan import Rows, RunPlan, plan_run
from nybble.train.predicted import compared, figures, suggestion, window_bytes
from nybble.train.preflight import check_data, data_notes
from nybble.train.processes import rank, wait_for_all, world_size
from nybble.train.progress import TrainingProgress
from nybble.train.record import RunRecord, facts
from nybble.train.resources import Resources
from nybble.train.start import check_start
from nybble.train.state import RunState, Training
from nybble.train.trackers import Trackers, check_trackers
from nybble.train.trainable import Trainable, check_method, check_reach, make_trainable


@dataclass(frozen=True)
class RunResult:
    """What a finished run made. folder: the adapter, or for method full the model. summary: all that run.json holds."""

    output: Path
    folder: Path
    parameters: ParameterCounts
    losses: tuple[float, ...]
    summary: dict[str, Any]


def run_training(
    config: RunConfig,
    *,
    resume: bool = False,
    quiet: bool = False,
    memory_report: Path | None = None,
    resources: Resources | None = None,
) -> RunResult:
    """Train as `config` says, into the folder `config.output`; with `resume`, go on from its newest whole checkpoint.

    memory_report: a file for a page that shows what holds memory in each phase of a step. resources: where rows and
    model come from; None: they are read for this run.
    The same settings on the same machine give the same bits (on a GPU with train.deterministic), resumed or not.
    Raises UserError before the first step for anything that would make the run useless, TrainingStopped when it
    cannot go on, TrainingInterrupted after Ctrl-C or SIGTERM, once the step is done and saved.
    """
    check_method(config)
    check_trackers(config.train.trackers)
    output = Path(config.output).expanduser()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), log_with=list(config.train.trackers) or None, project_dir=output
    )
    if accelerator.device.type == "cuda":
        expand_segments()
    check_state_bits(config.optim, several_processes=world_size() > 1)
    if rank() == 0:
        claim_output(output, resume=resume)
        if memory_report is not None:
            require_writable_file(memory_report)
    wait_for_all()
    console = Console(stderr=True, quiet=quiet or rank() != 0, soft_wrap=True, highlight=False, markup=False)
    with (
        explain_out_of_memory(config, accelerator.device),
        deterministic_kernels(enabled=config.train.deterministic),
    ):
        return _run(
            config,
            output,
            accelerator,
            console,
            resume=resume,
            memory_report=memory_report,
            resources=resources or Resources(),
        )


def _run(
    config: RunConfig,
    output: Path,
    accelerator: Accelerator,
    console: Console,
    *,
    resume: bool,
    memory_report: Path | None,
    resources: Resources,
) -> RunResult:
    device = accelerator.device
    show_bars = console.is_terminal and not console.quiet
    check_precision(config, device)
    reset_peak(device)

    # What is cheap comes first: a mistake in names shows before rows are tokenized, one in the data before the model is
    # loaded.
    base = Checkpoint.open(config.model.name, config.model.revision, trust_remote_code=config.model.trust_remote_code)
    check_start(config, base)
    check_reach(config, base)
    tokenizer = load_tokenizer(base, trust_remote_code=config.model.trust_remote_code)
    data = resources.prepare(config, base, tokenizer, progress=show_bars)
    check_data(data.report)
    tokenizer.chat_template = data.chat_template  # saved with the result: serving must render as training did
    course = Course.plan(len(data.train), config.train, world_size())

    rows = rows_of(data)
    plan = _plan(config, base, device, rows)
    plan.require_fit()
    for line in plan.lines():
        console.print(line)
    suggest = functools.partial(suggestion, config, plan, device)

    with explain_out_of_memory(config, device, during="loading the model", suggest=suggest):
        loaded = resources.load(config, base, tokenizer, plan=plan.memory, device=device, progress=show_bars)
        trainable = make_trainable(loaded, config)
        loss, how = make_loss(loaded, config, plan, samples_a_row=rows.samples)

    run = _assemble(config, output, loaded, trainable, loss, plan=plan, data=data, course=course)
    run.suggest = suggest
    run.memory_report = memory_report if rank() == 0 else None
    for line in [*trainable.lines(), *how, course.line(data.report, config.train), *data_notes(data)]:
        console.print(line)
    for note in run.restore() if resume else []:
        console.print(note)
    checked = run.check(trainable.final_bytes, trainable.start_bytes)
    console.print(str(checked))
    resources.ready(run)

    found = {"preflight": checked, "memory": figures(plan)}
    record = RunRecord(output, device, facts(config, loaded, trainable, data) | found)
    record.begin(run.state, config)
    with (
        record.closed_on_failure(),
        contextlib.closing(Trackers(accelerator, run.state.settings)) as trackers,
        TrainingProgress(course.total_steps, first_step=run.state.step, console=console) as progress,
        StopSignals() as signals,
    ):
        run.train(record, progress, trackers, signals)
        folder = trainable.weights.export(output, tokenizer)
    summary = record.finish(folder)
    for line in compared(plan, record.steps, device):
        console.print(line)
    return RunResult(output, folder, trainable.parameters, tuple(summary["losses"]), summary)


def _plan(config: RunConfig, base: Checkpoint, device: torch.device, rows: Rows) -> RunPlan:
    """The plan of the run, and the allocator capped if there is a budget."""
    card = card_within(config.memory.budget_bytes, device)
    return plan_run(config, base.config, card, rows=rows, on_gpu=device.type == "cuda", processes=world_size())


def _assemble(
    config: RunConfig,
    output: Path,
    loaded: LoadedModel,
    trainable: Trainable,
    loss: CausalLMLoss,
    *,
    plan: RunPlan,
    data: PreparedData,
    course: Course,
) -> Run:
    module = shard_or_replicate(loss, config.train) if world_size() > 1 else loss
    scaler = GradScaler(compute_device(loaded.model).type) if loaded.compute_dtype == torch.float16 else None
    optimizer = build_optimizer(module, config.optim, moments=plan.memory.moments)
    training = Training(trainable.weights, loss, optimizer, scaler)
    settings = run_settings(
        config,
        base_fingerprint=loaded.checkpoint.fingerprint,
        train=data.train,
        held_out=data.validation,
        compute=dtype_name(loaded.compute_dtype),
        processes=world_size(),
    )
    state = RunState(step=0, settings=settings)
    return Run(config, output, loaded, data, course, module, training, state, window_bytes=window_bytes(plan))
