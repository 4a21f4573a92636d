"""A comparison from what its runs left in their folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from nybble.compare.common_loss import common_loss, seconds_to
from nybble.compare.config import Arm
from nybble.compare.differences import differences_to
from nybble.compare.folder import Measured, Trained
from nybble.compare.layout import Layout, PlannedRun
from nybble.compare.measure import SHOWN_SAMPLES
from nybble.compare.report.verdict import give_verdict
from nybble.compare.result import (
    FORMAT,
    ArmResult,
    Comparison,
    HeldOutRows,
    Interval,
    Machine,
    Sample,
    Score,
    SeedResult,
    Statement,
    Status,
)
from nybble.compare.statistics import score_over_seeds, t_interval
from nybble.errors import UserError
from nybble.evaluation.intervals import bootstrap_ratio
from nybble.memory.host import total_host_bytes
from nybble.models.dtypes import resolve_device
from nybble.train.record import describe_device
from nybble.versions import installed_versions


def assemble(
    layout: Layout, statement: Statement, *, command: str | None = None, machine: Machine | None = None
) -> Comparison:
    """What is known by now: arms that are not finished say so. Raises UserError if arms were measured on other rows.

    machine: the runs' own; left out, it is asked for here, and this process holds memory of its GPU from then on.
    """
    measured = {arm.name: _measured(layout, arm) for arm in layout.compare.arms}
    test, validation = _rows(measured)
    curves = [run.curve for arm in layout.compare.trained for run in _trained(layout, arm)]
    common, of = common_loss(curves)
    arms = tuple(_arm(layout, arm, measured[arm.name], test, common, of) for arm in layout.compare.arms)
    trained = next((done for arm in layout.compare.arms for done in _trained(layout, arm)), None)
    comparison = Comparison(
        format=FORMAT,
        output=str(layout.output),
        title=f"{', '.join(arm.name for arm in arms)} on {layout.shared.model.name}",
        command=command,
        settings=layout.shared.model_dump(mode="json"),
        statement=statement,
        machine=machine or this_machine(),
        train_rows=trained.train_rows if trained else 0,
        train_tokens=trained.train_tokens if trained else 0,
        validation=validation,
        test=test,
        arms=arms,
        differences=differences_to(statement.reference, arms, statement, test),
        samples=_samples(measured),
        common_loss=common,
        common_loss_of=of,
        seconds=sum(done.seconds for arm in layout.compare.arms for done in _all_trained(layout, arm)),
    )
    return replace(comparison, verdict=give_verdict(comparison))


def _measured(layout: Layout, arm: Arm) -> list[tuple[PlannedRun, Measured]]:
    found = [(run, layout.measured(run)) for run in layout.results(arm)]
    return [(run, measured) for run, measured in found if measured is not None]


def _trained(layout: Layout, arm: Arm) -> list[Trained]:
    return [trained for run in layout.results(arm) if (trained := run.folder.trained)]


def _all_trained(layout: Layout, arm: Arm) -> list[Trained]:
    runs = {run.folder.path: run for run in [*layout.sweep(arm), *layout.results(arm)]}
    return [trained for run in runs.values() if (trained := run.folder.trained)]


def _rows(measured: dict[str, list[tuple[PlannedRun, Measured]]]) -> tuple[HeldOutRows, HeldOutRows]:
    """Test and validation rows, the same for all arms."""
    every = {name: found for name, runs in measured.items() for _, found in runs}
    first = next(iter(every.values()), None)
    if first is None:
        return HeldOutRows("none yet", ()), HeldOutRows("none yet", ())
    others = [name for name, found in every.items() if found.target_tokens != first.target_tokens]
    if others:
        what = f"arm {', '.join(others)} sees the test rows as other tokens than the first arm does"
        raise UserError(what, where="compare", fix="Compare models with one tokenizer.")
    return HeldOutRows(first.test_source, first.target_tokens, first.duplicates), HeldOutRows(
        first.validation_source, first.validation_tokens
    )


def _arm(
    layout: Layout,
    arm: Arm,
    measured: Sequence[tuple[PlannedRun, Measured]],
    test: HeldOutRows,
    common: float | None,
    of: str | None,
) -> ArmResult:
    planned = layout.results(arm)
    runs = tuple(_seed(layout, run, common, of) for run in planned)
    trained = next((done for run in planned if (done := run.folder.trained)), None)
    config = (planned or [layout.run(arm, layout.seeds[0])])[0].config
    swept = layout.swept(arm) if len(layout.compare.rates_of(arm)) > 1 else []
    status = _status(runs, tried=bool(planned), failed=bool(swept) and all(point.loss is None for point in swept))
    facts: dict[str, Any] = {}
    if trained is not None:
        facts = {
            name: getattr(trained, name)
            for name in ("trainable", "total", "disk_bytes", "weight_bytes", "predicted_bytes")
        }
    return ArmResult(
        name=arm.name,
        status=status,
        method=config.method if arm.trained else "base",
        storage=trained.storage if trained else config.model.storage,
        overrides=arm.overrides,
        config=config.model_dump(mode="json"),
        learning_rate=config.optim.learning_rate if arm.trained and planned else None,
        loss_interval=_loss_interval(runs, test),
        scores=_scores([found for _, found in measured]),
        runs=runs,
        sweep=tuple(swept),
        merges=next((found for run in planned if (found := run.folder.merges)), ()),
        error=next((text for text in [run.error for run in runs] + [point.error for point in swept] if text), None),
        **facts,
    )


def _seed(layout: Layout, run: PlannedRun, common: float | None, of: str | None) -> SeedResult:
    folder, seed = run.folder, run.config.train.seed
    where = str(folder.path.relative_to(layout.output))
    failure, trained, measured = folder.failure, folder.trained, layout.measured(run)
    if trained is None or measured is None:
        status: Status = "failed" if failure else "unfinished"
        return SeedResult(seed, where, status, str(failure) if failure else None)
    return SeedResult(
        seed,
        where,
        "finished",
        error=str(failure) if failure else None,  # of what came after, such as merging
        loss_before=measured.loss_before if measured.sums_before else None,
        loss=measured.loss,
        sequence_losses=measured.sums,
        curve=trained.curve,
        steps=trained.steps,
        tokens=trained.tokens,
        seconds=trained.seconds,
        tokens_per_second=trained.tokens_per_second,
        seconds_to_loss=seconds_to(trained.curve, common, of) if common is not None and of else None,
        energy_joules=trained.energy_joules,
        energy_seconds=trained.energy_seconds,
        memory=(*trained.memory, *measured.memory),
        scores={name: fmean(values) for name, values in measured.scores.items()} or None,
    )


def _status(runs: Sequence[SeedResult], *, tried: bool, failed: bool) -> Status:
    """Finished if any seed is and none is left to do."""
    states = {run.status for run in runs}
    if failed or states == {"failed"}:
        return "failed"
    return "finished" if tried and "unfinished" not in states else "unfinished"


def _loss_interval(runs: Sequence[SeedResult], test: HeldOutRows) -> Interval | None:
    finished = [run for run in runs if run.status == "finished" and run.loss is not None]
    if len(finished) > 1:
        return t_interval([run.loss for run in finished if run.loss is not None])
    return bootstrap_ratio(finished[0].sequence_losses, test.target_tokens) if finished else None


def _scores(measured: Sequence[Measured]) -> tuple[Score, ...]:
    by_seed = [scores for found in measured if (scores := found.scores)]
    names = by_seed[0] if by_seed else ()
    return tuple(score_over_seeds(name, [scores[name] for scores in by_seed]) for name in names)


def _samples(measured: dict[str, list[tuple[PlannedRun, Measured]]]) -> tuple[Sample, ...]:
    """The first of what was asked: all arms were asked the same."""
    first = {name: runs[0][1] for name, runs in measured.items() if runs}
    if not first:
        return ()
    one = next(iter(first.values()))
    asked = list(zip(one.prompts, one.expected, strict=True))[:SHOWN_SAMPLES]
    return tuple(
        Sample(prompt, expected, {name: found.answers[number] for name, found in first.items()})
        for number, (prompt, expected) in enumerate(asked)
    )


def this_machine() -> Machine:
    """Its GPU if there is one, which is in use by this process from then on."""
    device = resolve_device()
    described = describe_device(device)
    memory = described.get("memory_bytes") or total_host_bytes()
    cores = os.cpu_count() or 1
    return Machine(device.type, described["name"], memory, cores, installed_versions())
