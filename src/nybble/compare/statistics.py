"""Intervals for losses and for paired differences of losses, and the verdict that a margin allows.

Two things vary: the seed (start of the adapter, order of the data) and which rows were held out. Arms share both, so
differences are taken seed by seed and row by row, and what is common to both arms falls out of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev

from nybble.compare.result import Difference, Verdict
from nybble.evaluation.intervals import LEVEL, Interval, bootstrap_ratio
from nybble.evaluation.scores import Score


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """The mean of two or more independent values, by Student's t distribution."""
    half = t_quantile(level, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    centre = fmean(values)
    return Interval(centre - half, centre + half, level, f"t interval over {len(values)} seeds")


def t_quantile(level: float, degrees: int) -> float:
    """The t that a variable of `degrees` degrees of freedom stays within, on both sides, with probability `level`."""
    low, high = 0.0, math.pi / 2
    for _ in range(100):  # each halves the error of the angle
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, degrees) < level else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


def score_over_seeds(name: str, by_seed: Sequence[Sequence[float]]) -> Score:
    """by_seed: the score of each question.

    The interval is over seeds, or over questions where seeds tell nothing: one alone, or several that agree.
    """
    means = [fmean(values) for values in by_seed]
    if len(set(means)) == 1:
        return Score.over_questions(name, [fmean(values) for values in zip(*by_seed, strict=True)])
    interval = t_interval(means)
    within = replace(interval, low=max(0.0, interval.low), high=min(1.0, interval.high))
    return Score(name, fmean(means), within, len(by_seed[0]))


def compare_losses(
    arm: tuple[str, Mapping[int, Sequence[float]]],
    reference: tuple[str, Mapping[int, Sequence[float]]],
    target_tokens: Sequence[int],
    *,
    margin: float,
    level: float = LEVEL,
) -> Difference | None:
    """The arm's loss less the reference's; None if there is no seed that both finished.

    arm, reference: name, and by seed the sum of the loss of each held-out row over its target tokens.
    """
    (name, own), (reference_name, others) = arm, reference
    seeds = tuple(sorted(own.keys() & others.keys()))
    if not seeds:
        return None
    rows = [[ours - theirs for ours, theirs in zip(own[s], others[s], strict=True)] for s in seeds]
    by_seed = tuple(sum(differences) / sum(target_tokens) for differences in rows)
    over_rows = bootstrap_ratio([fmean(row) for row in zip(*rows, strict=True)], target_tokens, level=level)
    interval = t_interval(by_seed, level) if len(seeds) > 1 else over_rows
    verdict = judge(interval, margin)
    return Difference(
        name, reference_name, seeds, fmean(by_seed), by_seed, interval, over_rows, margin=margin, verdict=verdict
    )


def judge(interval: Interval, margin: float) -> Verdict:
    """What an interval for a difference (negative: better) says, as `Difference` has it."""
    if interval.high < 0:
        return "better"
    if interval.high <= margin:
        return "not worse"
    return "worse" if interval.low > margin else "inconclusive"


def _t_within(angle: float, degrees: int) -> float:
    """P(|T| < t) for t = tan(angle) sqrt(degrees): the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    cosine, sine = math.cos(angle), math.sin(angle)
    term = total = 1.0 if degrees % 2 == 0 else cosine
    for power in range(2 + degrees % 2, degrees - 1, 2):
        term *= cosine**2 * (power - 1) / power
        total += term
    if degrees % 2 == 0:
        return sine * total
    return 2 / math.pi * (angle + (sine * total if degrees > 1 else 0.0))
