"""What is shown while a model is measured: a bar on a terminal, else nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def counted(what: str, total: int, *, progress: bool) -> Iterator[Callable[[int], None]]:
    """Yields what is to be told how many more of `total` are finished."""
    console = Console(stderr=True)  # standard output is for figures
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
