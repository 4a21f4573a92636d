"""`nybble compare`: several ways to train on the same data, side by side."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nybble.cli.options import AsJson, ConfigFile, Data, Model, Settings, print_json, read_settings

Arms = Annotated[
    str, typer.Option(help="Names out of base, lora, qlora and full, or a YAML file with arms of your own.")
]
Seeds = Annotated[
    int | None, typer.Option(min=1, help="Runs for each arm, each with a seed of its own; 1 if left out.")
]
Rates = Annotated[str | None, typer.Option(help="Learning rates, like 1e-4,3e-4: the best one for each arm is used.")]
Margin = Annotated[
    float | None, typer.Option(min=0, help="Nats by which an arm may be worse and count as equal; 0.01 if left out.")
]
Reference = Annotated[str | None, typer.Option(help="The arm that others are held against; lora if left out.")]
Test = Annotated[str | None, typer.Option(help="Rows for the results: file, folder or hub dataset id.")]
Samples = Annotated[
    int | None,
    typer.Option(min=0, help="Test rows that every run answers, scored where data have answers; 32 if left out."),
]
Merge = Annotated[
    bool | None, typer.Option("--merge", help="Merge the first adapter of each arm and measure what that costs.")
]


def compare(
    config: ConfigFile = None,
    model: Model = None,
    data: Data = None,
    arms: Arms = "base,lora,qlora",
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder of the comparison, with a run folder for each run.")
    ] = None,
    seeds: Seeds = None,
    learning_rates: Rates = None,
    margin: Margin = None,
    reference: Reference = None,
    test: Test = None,
    samples: Samples = None,
    merge: Merge = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Train in several ways on the same data, side by side.

    Same data, order, seeds and steps; only what an arm names differs. Learning
    rates are chosen by validation rows, results are those of test rows. Arms
    of one base are trained over one copy of it. Finished runs are kept: the
    same command goes on where it stopped. comparison.json holds all figures,
    report.html shows them.
    """
    run = read_settings(config, settings, model__name=model, data__path=data, output=output)

    from nybble.compare.config import read_arms
    from nybble.compare.report.write import PAGE
    from nybble.compare.run import compare_arms
    from nybble.compare.table import comparison_lines, comparison_table

    options = {
        "seeds": seeds,
        "learning_rates": learning_rates.split(",") if learning_rates else None,
        "margin": margin,
        "reference": reference,
        "test": test,
        "samples": samples,
        "merge": merge,
    }
    given = {name: value for name, value in options.items() if value is not None}
    command = shlex.join(["nybble", *sys.argv[1:]])
    comparison = compare_arms(run, read_arms(arms, given), command=command)
    if as_json:
        print_json(comparison.figures())
        return
    console = Console()
    console.print(comparison_table(comparison))
    for line in comparison_lines(comparison):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"Report: {Path(comparison.output) / PAGE}", highlight=False, markup=False, soft_wrap=True)
