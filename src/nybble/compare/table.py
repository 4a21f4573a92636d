"""A comparison as a table for the terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table

from nybble.compare.report.words import intervals_of, meaning, spread
from nybble.compare.result import ArmResult, Comparison
from nybble.units import format_bytes, format_count, plural


def comparison_table(comparison: Comparison) -> Table:
    """One row an arm; device memory has a column where there is a device. It fits into 80 characters without."""
    with_device = any(result.peak_device_bytes is not None for result in comparison.arms)
    steps = max((result.steps for result in comparison.arms), default=0)
    seeds = len(comparison.statement.seeds)
    runs = f"same data, {steps} steps" if seeds == 1 else f"same data, {steps} steps, mean of {seeds} seeds"
    title = f"{runs[0].upper()}{runs[1:]}; loss on held-out rows, nats a token"
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


def comparison_lines(comparison: Comparison) -> list[str]:
    """What the table does not hold: how rates were chosen, differences from the reference, scores and failures."""
    lines = [
        f"{arm.name}: learning rate {arm.learning_rate:g} is the best of {len(arm.sweep)} by validation rows"
        for arm in comparison.arms
        if arm.sweep and arm.learning_rate is not None
    ]
    for found in comparison.differences:
        low, high = found.interval.low, found.interval.high
        lines.append(
            f"{found.arm} - {found.reference}: {found.mean:+.4f} nats, {found.interval.level:.0%} within "
            f"[{low:+.4f}, {high:+.4f}] ({found.interval.how}): {meaning(found)}"
        )
    for arm in comparison.arms:
        if arm.scores:
            answers = plural(arm.scores[0].questions, "answer")
            scores = ", ".join(f"{score.name} {spread(score)}" for score in arm.scores)
            how = intervals_of(arm.scores)
            lines.append(f"{arm.name}: {scores} over {answers}{f', {how}' if how else ''}")
    for arm in comparison.arms:
        failed = [run for run in arm.runs if run.error]
        lines += [f"{arm.name}, seed {run.seed}: {run.error}" for run in failed]
        lines += [
            f"{arm.name}, learning rate {point.learning_rate:g}: {point.error}" for point in arm.sweep if point.error
        ]
    return lines


def _cells(result: ArmResult, with_device: bool) -> list[str]:
    if not result.finished:
        return [
            result.name,
            result.storage,
            "-",
            *(["-"] if with_device else []),
            "-",
            "-",
            "-",
            result.status,
            "-",
            "-",
        ]
    device = "-" if result.peak_device_bytes is None else format_bytes(result.peak_device_bytes)
    trained = f"{format_count(result.trainable)} {result.trainable / result.total:.1%}"
    return [
        result.name,
        result.storage,
        trained if result.trainable else "-",
        format_bytes(result.peak_host_bytes),
        *([device] if with_device else []),
        f"{result.tokens_per_second:.0f}" if result.tokens_per_second else "-",
        _loss(result.loss_before),
        _loss(result.loss_after) if result.trainable else "-",
        _loss(result.gain) if result.trainable else "-",
        format_bytes(result.disk_bytes),
    ]


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
