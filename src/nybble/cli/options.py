"""Options that several verbs share, and how they become settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from nybble.config import RunConfig, parse_assignment

ConfigFile = Annotated[
    Path | None, typer.Argument(metavar="CONFIG", help="YAML file with settings; options override it.")
]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Checkpoint folder, or model id on the Hugging Face hub.")
]
Data = Annotated[
    str | None, typer.Option("--data", "-d", help="File, folder with train and valid files, or hub dataset id.")
]
Adapter = Annotated[
    Path | None, typer.Option("--adapter", "-a", help="Adapter folder, or the run folder that holds it.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write; it must not exist yet.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any setting, like lora.r=8. Repeatable.")
]
CalibrationPath = Annotated[
    str | None,
    typer.Option(
        "--calibration", help="Text file or data to pass through the model first; neither for training nor for tests."
    ),
]
CalibrationTokens = Annotated[int, typer.Option(min=1, help="How much of it, in tokens.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]


def read_settings(config: Path | None, settings: list[str] | None, **options: Any) -> RunConfig:
    """A run's settings: the file's, over them the options given (`model__name` is model.name), over them `--set`."""
    given = {name.replace("__", "."): value for name, value in options.items() if value is not None}
    return RunConfig.read(config, given | dict(map(parse_assignment, settings or [])))


def print_json(figures: Any) -> None:
    typer.echo(json.dumps(figures, indent=2, default=str))
