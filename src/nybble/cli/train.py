"""`nybble train`: a run from settings to a saved adapter or model."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Annotated

import typer

from nybble.cli.options import AsJson, ConfigFile, Data, Model, Settings, print_json, read_settings
from nybble.config import Method
from nybble.units import format_bytes, format_seconds


def train(
    config: ConfigFile = None,
    model: Model = None,
    data: Data = None,
    method: Annotated[Method | None, typer.Option(help="How to train; qlora if nothing says otherwise.")] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder of the run: adapter, checkpoints, figures.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
    memory_report: Annotated[
        Path | None, typer.Option(help="File for a page (.html) about what holds memory in each phase of a step.")
    ] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model with LoRA, QLoRA or all of its weights.

    Model, data and output must be given, here or in CONFIG. Before the
    first step it shows how the run will use memory and checks that it
    trains. Ctrl-C finishes the step and saves; --resume goes on from there.

    Several processes: torchrun --nproc-per-node N -m nybble train ...
    """
    run = read_settings(config, settings, model__name=model, data__path=data, method=method, output=output)

    # Imports make 400,000 objects, and all stay: to search them for garbage is a quarter of the time that imports take,
    # and 0.2 s each time that it is done between steps.
    gc.disable()
    from nybble.train.processes import rank
    from nybble.train.run import run_training

    gc.freeze()
    gc.enable()
    result = run_training(run, resume=resume, memory_report=memory_report)
    if rank() != 0:
        return
    if as_json:
        print_json(result.summary)
        return
    summary = result.summary
    typer.echo(f"loss {result.losses[0]:.4f} -> {result.losses[-1]:.4f} in {len(result.losses)} steps")
    if best := summary["best_evaluation"]:
        typer.echo(f"held-out loss {summary['evaluations'][0]['loss']:.4f} -> {best['loss']:.4f}")
    typer.echo(
        f"{format_seconds(summary['seconds'])}, {summary['tokens_per_second']:.0f} tokens/s, "
        f"peak {format_bytes(summary['peak_device_bytes'])}"
    )
    typer.echo(f"saved to {result.folder}")
