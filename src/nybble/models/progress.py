"""Progress over the tensors of a checkpoint, in bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from nybble.models.checkpoint import Checkpoint


def shown(
    groups: Iterable[tuple[str, ...]], checkpoint: Checkpoint, verb: str, *, progress: bool
) -> Iterator[tuple[str, ...]]:
    """Pass on groups of the checkpoint's weights, with a bar of their bytes if `progress` and there is a terminal."""
    console = Console(stderr=True)  # standard output is for figures
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task(f"{verb} {checkpoint.name}", total=checkpoint.total_bytes)
        for keys in groups:
            yield keys
            bar.advance(task, sum(checkpoint.source_bytes(key) for key in keys))
