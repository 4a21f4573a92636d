"""A comparison as a table for the terminal."""

from __future__ import annotations

from rich.table import Table

from nybble.compare.result import ArmResult, Comparison
from nybble.units import format_bytes, format_count, format_seconds


def comparison_table(comparison: Comparison) -> Table:
    """One row an arm; device memory has a column where there is a device."""
    with_device = any(result.peak_device_bytes is not None for result in comparison.arms)
    steps = max((result.steps for result in comparison.arms), default=0)
    table = Table(title=f"Same data, seeds and steps ({steps})", title_justify="left", title_style="bold")
    table.add_column("arm", style="bold")
    for name in ("weights in", "trainable", "share", "peak host", *(["peak device"] if with_device else [])):
        table.add_column(name, justify="right")
    for name in ("tokens/s", "held-out loss", "fell by", "on disk", "time"):
        table.add_column(name, justify="right")
    for result in comparison.arms:
        table.add_row(*_cells(result, with_device))
    return table


def _cells(result: ArmResult, with_device: bool) -> list[str]:
    trained = result.trainable > 0
    device = "-" if result.peak_device_bytes is None else format_bytes(result.peak_device_bytes)
    return [
        result.arm,
        result.storage,
        format_count(result.trainable),
        f"{result.trainable / result.total:.2%}",
        format_bytes(result.peak_host_bytes),
        *([device] if with_device else []),
        f"{result.tokens_per_second:.0f}",
        f"{result.loss_before:.3f} -> {result.loss_after:.3f}" if trained else f"{result.loss_after:.3f}",
        f"{result.gain:.3f}" if trained else "-",
        format_bytes(result.disk_bytes),
        format_seconds(result.seconds),
    ]
