"""A comparison's figures as tables of text, the same for the page and for Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from nybble.compare.report.curves import Point, shows_validation, training_curve, validation_curve
from nybble.compare.report.verdict import trained_arms
from nybble.compare.report.words import (
    NOTHING,
    between,
    intervals_of,
    level,
    listed,
    loss,
    needed_bytes,
    signed,
    size,
    speed,
    spread,
)
from nybble.compare.result import ArmResult, Comparison, PhaseMemory, Score, SeedResult
from nybble.units import format_count, format_seconds, plural

# Phases of a run that the planner has another name for.
_PLANNED = {"train": "step", "evaluate": "evaluation"}


@dataclass(frozen=True)
class Table:
    """columns: headings; the first and those in `words` hold text, the others figures. folded: shown on request."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[str, ...] = ()
    folded: bool = False

    @classmethod
    def of_arms(cls, title: str, arms: Sequence[ArmResult], columns: dict[str, Callable[[ArmResult], str]]) -> Table:
        """One row an arm; a column that has nothing for any of them is left out."""
        cells = {heading: [cell(arm) for arm in arms] for heading, cell in columns.items()}
        known = {heading: column for heading, column in cells.items() if any(cell != NOTHING for cell in column)}
        names = [arm.name for arm in arms]
        return cls(title, ("arm", *known), tuple(zip(names, *known.values(), strict=True)) if known else ())


def overview(comparison: Comparison) -> Table:
    def against(arm: ArmResult) -> str:
        found = comparison.difference(arm.name)
        if found is None:
            return "reference" if arm.name == comparison.statement.reference else NOTHING
        return signed(found.mean)

    return Table.of_arms(
        "At a glance",
        comparison.arms,
        {
            "held-out loss": lambda arm: loss(arm.loss_after),
            f"to {comparison.statement.reference}": against,
            **_each_score(comparison, lambda found: f"{found.value:.3f}"),
            "peak memory": lambda arm: size(needed_bytes(arm)),
            "tokens/s": lambda arm: speed(arm.tokens_per_second) if arm.trainable else NOTHING,
            "weights": lambda arm: arm.storage,
            "trained": lambda arm: (
                f"{format_count(arm.trainable)} {arm.trainable / arm.total:.1%}"
                if arm.trainable and arm.total
                else NOTHING
            ),
            "on disk": lambda arm: size(arm.disk_bytes),
        },
    )


def quality(comparison: Comparison) -> Table:
    return Table.of_arms(
        "Held-out loss, nats a token",
        comparison.arms,
        {
            "before": lambda arm: loss(arm.loss_before),
            "after, mean": lambda arm: loss(arm.loss_after) if arm.trainable else NOTHING,
            "interval": lambda arm: (
                f"{arm.loss_interval.low:.4f} to {arm.loss_interval.high:.4f}" if arm.loss_interval else NOTHING
            ),
            "best seed": lambda arm: _extreme(arm, min),
            "worst seed": lambda arm: _extreme(arm, max),
            "seeds": lambda arm: str(len(arm.finished)) if arm.trainable and arm.finished else NOTHING,
        },
    )


def answers(comparison: Comparison) -> Table:
    """How well the test rows were answered; empty where the data have no answers."""
    found = [score for arm in comparison.arms for score in arm.scores]
    if not found:
        return Table("", (), ())
    how = intervals_of(found)
    title = f"Answers to {plural(found[0].questions, 'test row')}, from 0 to 1{f', with {how}' if how else ''}"
    table = Table.of_arms(title, comparison.arms, _each_score(comparison, spread) | {"interval by": _intervals_by})
    return replace(table, words=("interval by",) if how else ())


def _intervals_by(arm: ArmResult) -> str:
    shown = [score.telling_interval for score in arm.scores if score.telling_interval]
    return listed(list(dict.fromkeys(interval.how for interval in shown))) or NOTHING


def _each_score(comparison: Comparison, text: Callable[[Score], str]) -> dict[str, Callable[[ArmResult], str]]:
    """A column for every score."""

    def column(name: str) -> Callable[[ArmResult], str]:
        return lambda arm: text(found) if (found := arm.score(name)) else NOTHING

    return {name: column(name) for name in comparison.score_names}


def differences(comparison: Comparison) -> Table:
    found = comparison.differences
    heading = f"{level(found[0].interval)} interval" if found else "interval"
    rows = tuple(
        (one.arm, signed(one.mean), between(one.interval), between(one.over_rows), one.verdict, one.interval.how)
        for one in found
    )
    return Table(
        f"Difference to {comparison.statement.reference}, nats a token; below 0 is better",
        ("arm", "mean", heading, "over test rows", "verdict", "interval by"),
        rows,
        words=("verdict", "interval by"),
    )


def curves(comparison: Comparison) -> tuple[Table, ...]:
    """What the pictures of curves show, at a few steps."""
    arms = trained_arms(comparison)
    trained = {arm.name: training_curve(arm) for arm in arms}
    training = _by_step("Training loss, running mean, by step", trained, lambda point: loss(point.mean))
    if not shows_validation(arms):
        return (training,)
    evaluated = {arm.name: validation_curve(arm) for arm in arms}
    return (
        _by_step("Validation loss by step", evaluated, lambda point: loss(point.mean)),
        _by_step("Seconds of training by step", evaluated, lambda point: f"{point.seconds:,.1f}"),
        training,
    )


def _by_step(title: str, of_arms: Mapping[str, Sequence[Point]], text: Callable[[Point], str]) -> Table:
    steps = sorted({point.step for curve in of_arms.values() for point in curve})
    shown = [steps[round(n * (len(steps) - 1) / 7)] for n in range(8)] if len(steps) > 8 else steps
    at = {name: {point.step: text(point) for point in curve} for name, curve in of_arms.items()}
    rows = tuple((f"{step:,}", *(at[name].get(step, NOTHING) for name in at)) for step in shown)
    return Table(f"{title}, mean over seeds", ("step", *at), rows, folded=True)


def memory(comparison: Comparison) -> Table:
    rows = [
        (arm.name, phase.phase, size(phase.host_bytes), size(phase.device_bytes), _predicted(arm, phase.phase))
        for arm in comparison.arms
        for phase in peak_phases(arm)
    ]
    columns = ("arm", "phase", "host", "device", "device, predicted")
    used = [n for n in range(len(columns)) if any(row[n] != NOTHING for row in rows)]
    kept = tuple(tuple(row[n] for n in used) for row in rows)
    return Table("Peak memory by phase", tuple(columns[n] for n in used), kept, words=("phase",), folded=True)


def costs(comparison: Comparison) -> Table:
    to_loss = "to loss" if comparison.common_loss is None else f"to loss {comparison.common_loss:.4f}"
    return Table.of_arms(
        "What training took, mean over seeds",
        trained_arms(comparison),
        {
            "tokens/s": lambda arm: speed(arm.tokens_per_second),
            "steps": lambda arm: f"{arm.steps:,}",
            "time": lambda arm: _seconds(arm, lambda run: run.seconds or None),
            to_loss: lambda arm: _seconds(arm, lambda run: run.seconds_to_loss),
            "energy": lambda arm: _energy(arm, lambda run: run.energy_joules, 3600, "Wh"),
            "power": lambda arm: _energy(
                arm, lambda run: (run.energy_joules or 0) / run.energy_seconds if run.energy_seconds else None, 1, "W"
            ),
        },
    )


def merges(comparison: Comparison) -> Table:
    rows = tuple(
        (
            arm.name,
            merge.base,
            loss(merge.adapter_loss),
            loss(merge.merged_loss),
            signed(merge.merged_loss - merge.adapter_loss),
            f"{merge.largest_logit_gap:.3g}",
        )
        for arm in comparison.arms
        for merge in arm.merges
    )
    columns = ("arm", "merged into", "adapter's loss", "merged loss", "change", "largest logit gap")
    return Table("Held-out loss once merged, nats a token", columns, rows, words=("merged into",))


def sweeps(comparison: Comparison) -> Table:
    swept = [arm for arm in comparison.arms if arm.sweep]
    rates = sorted({point.learning_rate for arm in swept for point in arm.sweep})

    def cell(arm: ArmResult, rate: float) -> str:
        point = next((point for point in arm.sweep if point.learning_rate == rate), None)
        if point is None:
            return NOTHING
        text = "failed" if point.loss is None else loss(point.loss)
        return f"{text} ✓" if rate == arm.learning_rate else text

    rows = tuple((arm.name, *(cell(arm, rate) for rate in rates)) for arm in swept)
    title = "Loss on validation rows by learning rate, one seed; ✓ is what the arm was then run with"
    return Table(title, ("arm", *(f"{rate:g}" for rate in rates)), rows)


def runs(comparison: Comparison) -> Table:
    names = comparison.score_names
    rows = tuple(
        (
            arm.name,
            str(run.seed),
            f"{run.status}: {run.error}" if run.error else run.status,
            loss(run.loss_before),
            loss(run.loss) if arm.trainable else NOTHING,
            *(f"{(run.scores or {})[name]:.3f}" if name in (run.scores or {}) else NOTHING for name in names),
            f"{run.steps:,}",
            f"{run.tokens:,}",
            format_seconds(run.seconds),
            run.folder,
        )
        for arm in comparison.arms
        for run in arm.runs
    )
    columns = ("arm", "seed", "status", "before", "after", *names, "steps", "tokens", "time", "folder")
    return Table("Every run that was begun", columns, rows, words=("status", "folder"), folded=True)


def peak_phases(arm: ArmResult) -> list[PhaseMemory]:
    """Of each phase, the largest peak over the arm's runs."""
    names = dict.fromkeys(phase.phase for run in arm.finished for phase in run.memory)
    return [_largest(name, [p for run in arm.finished for p in run.memory if p.phase == name]) for name in names]


def _largest(name: str, peaks: Sequence[PhaseMemory]) -> PhaseMemory:
    on_device = [peak.device_bytes for peak in peaks if peak.device_bytes is not None]
    return PhaseMemory(name, max(peak.host_bytes for peak in peaks), max(on_device, default=None))


def predicted_phase(arm: ArmResult, phase: str) -> dict[str, int]:
    """What the planner expected to hold the device in a phase that was measured, by category."""
    return (arm.predicted_bytes or {}).get(_PLANNED.get(phase, phase), {})


def _predicted(arm: ArmResult, phase: str) -> str:
    return size(sum(predicted_phase(arm, phase).values()))


def _extreme(arm: ArmResult, choose: Callable[[list[float]], float]) -> str:
    losses = [run.loss for run in arm.finished if run.loss is not None]
    return loss(choose(losses)) if arm.trainable and len(losses) > 1 else NOTHING


def _seconds(arm: ArmResult, of: Callable[[SeedResult], float | None]) -> str:
    known = [value for run in arm.finished if (value := of(run)) is not None]
    return format_seconds(fmean(known)) if known else NOTHING


def _energy(arm: ArmResult, of: Callable[[SeedResult], float | None], divisor: float, unit: str) -> str:
    known = [value for run in arm.finished if (value := of(run))]
    return f"{fmean(known) / divisor:.3g} {unit}" if known else NOTHING
