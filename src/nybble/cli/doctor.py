"""`nybble doctor`: what this machine can do."""

from __future__ import annotations

from dataclasses import asdict

import typer
from rich.console import Console
from rich.table import Table

from nybble.cli.options import AsJson, print_json


def doctor(as_json: AsJson = False) -> None:
    """Show what this machine can do.

    Device, versions and kernels, and self-tests of NF4 and of a LoRA step.
    The exit code is 1 if one fails.
    """
    from nybble.doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        print_json(asdict(diagnosis) | {"healthy": diagnosis.healthy})
    else:
        table = Table.grid(padding=(0, 2))
        for name, value in diagnosis.facts.items():
            table.add_row(f"[bold]{name}[/bold]", value)
        for check in diagnosis.checks:
            mark = "[green]pass[/green]" if check.passed else "[bold red]FAIL[/bold red]"
            table.add_row(mark, f"{check.name}: {check.detail}")
        Console().print(table)
    if not diagnosis.healthy:
        raise typer.Exit(1)
