"""`nybble plan`: whether a run fits a card, and how, before anything is fetched or loaded."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nybble.cli.options import AsJson, ConfigFile, Model, Settings, print_json, read_settings
from nybble.config import Method
from nybble.errors import UserError
from nybble.planner.cards import DeviceSpec, card, card_of_memory
from nybble.units import parse_bytes


def plan(
    config: ConfigFile = None,
    model: Model = None,
    method: Annotated[Method | None, typer.Option(help="How to train; qlora if nothing says otherwise.")] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", "-g", help="Card by its name, like 4090 or h100.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of the card, or what of it to use, like 24GiB.")] = None,
    host_memory: Annotated[str | None, typer.Option(help="Host memory that may be locked, like 64GiB.")] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Show whether a run fits, how, how fast, and what holds the memory.

    From the model's config.json alone, in a second, without a GPU. Without
    --gpu and --memory it is for the GPU here, or else for cards of all
    sizes. --model gpt3 has the sizes of GPT-3.
    """
    run = read_settings(config, settings, model__name=model, method=method, data__path=".", output=".")

    from nybble.models.hub import read_model_config
    from nybble.planner.shapes import gpt3
    from nybble.train.plan_report import plan_overview, plan_report

    device, host_bytes = _card(gpu, memory), _bytes(host_memory, "--host-memory") if host_memory else None
    if device is not None and host_bytes is not None:
        device = device.with_host(host_bytes)
    published = run.model.name == "gpt3" and not Path("gpt3").exists()
    sizes = gpt3() if published else read_model_config(run.model.name, run.model.revision)
    found = plan_overview(run, sizes, host_bytes) if device is None else plan_report(run, sizes, device)
    if as_json:
        print_json(found.figures())
    else:
        Console().print(found)


def _card(gpu: str | None, memory: str | None) -> DeviceSpec | None:
    """The one that is asked for, or the one here; None if there is none."""
    memory_bytes = _bytes(memory, "--memory") if memory else None
    if gpu:
        found = card(gpu)
        return found if memory_bytes is None else found.with_memory(memory_bytes)
    if memory_bytes is not None:
        found = card_of_memory(memory_bytes)
        return dataclasses.replace(found, name=f"a card like {found.name}")
    if shutil.which("nvidia-smi") is None:  # importing torch to ask takes seconds
        return None
    import torch

    from nybble.train.card import card_here

    return card_here(torch.device("cuda")) if torch.cuda.is_available() else None


def _bytes(text: str, option: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise UserError(str(error), where=option) from None
