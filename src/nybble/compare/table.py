"""A comparison as a table for the terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table

from nybble.compare.single import ArmResult, Comparison
from nybble.units import format_bytes, format_count


def comparison_table(comparison: Comparison) -> Table:
    """One row an arm; device memory has a column where there is a device. It fits into 80 characters without."""
    with_device = any(result.peak_device_bytes is not None for result in comparison.arms)
    steps = max((result.steps for result in comparison.arms), default=0)
    title = f"Same data, seeds and {steps} steps; loss on held-out rows, nats a token"
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0, show_edge=False
    )
    table.add_column("arm", style="bold")
    memory = ("host peak", "device peak") if with_device else ("peak memory",)
    for name in ("weights", "trained", *memory, "tok/s", "before", "after", "fell by", "on disk"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in comparison.arms:
        table.add_row(*_cells(result, with_device))
    return table


def _cells(result: ArmResult, with_device: bool) -> list[str]:
    device = "-" if result.peak_device_bytes is None else format_bytes(result.peak_device_bytes)
    trained = f"{format_count(result.trainable)} {result.trainable / result.total:.1%}"
    return [
        result.arm,
        result.storage,
        trained if result.trainable else "-",
        format_bytes(result.peak_host_bytes),
        *([device] if with_device else []),
        f"{result.tokens_per_second:.0f}",
        f"{result.loss_before:.3f}",
        f"{result.loss_after:.3f}" if result.trainable else "-",
        f"{result.gain:.3f}" if result.trainable else "-",
        format_bytes(result.disk_bytes),
    ]
