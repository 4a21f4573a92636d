"""`nybble compare`: several methods on the same data, side by side."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from nybble.cli.options import AsJson, ConfigFile, Data, Model, Settings, print_json, read_settings


def compare(
    config: ConfigFile = None,
    model: Model = None,
    data: Data = None,
    arms: Annotated[str, typer.Option(help="Which to run, of base, lora, qlora and full.")] = "base,lora,qlora",
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder for a run folder an arm.")] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Train in several ways on the same data, side by side.

    Same data, seeds and steps; only the method differs. Each arm runs in a
    process of its own, so that its peak of memory is its own. Finished arms
    are kept: the same command goes on where it stopped.
    """
    run = read_settings(config, settings, model__name=model, data__path=data, output=output)

    from nybble.compare.single import parse_arms
    from nybble.compare.run import compare_arms
    from nybble.compare.table import comparison_table

    comparison = compare_arms(run, parse_arms(arms))
    if as_json:
        print_json(comparison.figures())
    else:
        Console().print(comparison_table(comparison))
