"""Held-out losses of a comparison's arms less those of one of them."""

from __future__ import annotations

from collections.abc import Sequence

from nybble.compare.result import ArmResult, Difference, HeldOutRows, Statement
from nybble.compare.statistics import compare_losses


def differences_to(
    reference: str, arms: Sequence[ArmResult], statement: Statement, test: HeldOutRows
) -> tuple[Difference, ...]:
    """Of every other arm that trains, by the seeds that it and the `reference` finished; none without such a seed."""
    losses = {arm.name: _sums_by_seed(arm) for arm in arms if arm.method != "base"}
    own = (reference, losses.get(reference, {}))
    found = [
        compare_losses((name, sums), own, test.target_tokens, margin=statement.margin, level=statement.level)
        for name, sums in losses.items()
        if name != reference
    ]
    return tuple(difference for difference in found if difference is not None)


def _sums_by_seed(arm: ArmResult) -> dict[int, tuple[float, ...]]:
    return {run.seed: run.sequence_losses for run in arm.finished if run.sequence_losses}
