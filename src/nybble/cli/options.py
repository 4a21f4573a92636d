"""Options that several verbs share, and how they become settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nybble.config import RunConfig, parse_assignment
from nybble.errors import UserError

if TYPE_CHECKING:
    from nybble.calibrate.run import Calibration
    from nybble.models.checkpoint import Checkpoint

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
    list[str] | None,
    typer.Option(
        "--set", metavar="SECTION.KEY=VALUE", help="Any setting of docs/settings.md, like lora.r=8. Repeatable."
    ),
]
CalibrationPath = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="Text file or data like what the model is for; rows to train on will do, rows to test on will not.",
    ),
]
CalibrationTokens = Annotated[
    int | None, typer.Option(min=1, help="How much of --calibration, in tokens; 65,536 if left out.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]


def read_settings(
    config: Path | None, settings: list[str] | None, *, adapter: Path | None = None, **options: Any
) -> RunConfig:
    """A run's settings: the file's, over them the options given (`model__name` is model.name), over them `--set`.

    Without a file, and where no model is named, it is the base of `adapter`.
    """
    given = {name.replace("__", "."): value for name, value in options.items() if value is not None}
    given |= dict(map(parse_assignment, settings or []))
    if adapter is not None and config is None and "model.name" not in given:
        given = _base_of(adapter) | given
    return RunConfig.read(config, given)


def _base_of(adapter: Path) -> dict[str, Any]:
    """The model that the adapter names as its base, as settings."""
    from nybble.adapters.saved import read_adapter

    saved = read_adapter(adapter)
    named = {"model.name": saved.base_model_name, "model.revision": saved.revision}
    return {name: value for name, value in named.items() if value is not None}


def read_calibration(
    path: str | None, tokens: int | None, checkpoint: Checkpoint, *, trust_remote_code: bool
) -> Calibration | None:
    """The text of `--calibration`, if there is one."""
    from nybble.calibrate.run import TOKENS, Calibration

    if path is None:
        if tokens is not None:
            raise UserError("there is no text", where="--calibration-tokens", fix="Give it with --calibration.")
        return None
    return Calibration.read(path, checkpoint, tokens=tokens or TOKENS, trust_remote_code=trust_remote_code)


def print_json(figures: Any) -> None:
    typer.echo(json.dumps(figures, indent=2, default=str))
