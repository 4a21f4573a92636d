"""Which arm to choose on this machine, and why, in plain words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nybble.compare.differences import differences_to
from nybble.compare.report.words import (
    alike,
    apart,
    between,
    level,
    listed,
    meaning,
    memory_beside,
    needed_bytes,
    signed,
    size,
    speed_beside,
)
from nybble.compare.result import Advice, ArmResult, Comparison, Difference
from nybble.units import plural

# Inference over seeds needs at least as many as leave its interval some meaning.
_FEW_SEEDS = 3


def give_verdict(comparison: Comparison) -> Advice:
    """Of the arms as good as any by the margin stated beforehand, the fastest; of those as fast, the smallest."""
    trained = trained_arms(comparison)
    choice, headline, because = _choose(comparison, trained)
    points = [
        *(_against_reference(comparison, found) for found in comparison.differences),
        *_if_memory_binds(comparison, trained, choice),
        *_merging(trained),
    ]
    return Advice(choice, headline, because, tuple(points), tuple(_cautions(comparison, trained)))


def trained_arms(comparison: Comparison) -> list[ArmResult]:
    """Those that trained and have a result."""
    return [arm for arm in comparison.arms if arm.trainable and arm.finished]


def _choose(comparison: Comparison, trained: Sequence[ArmResult]) -> tuple[str | None, str, str]:
    reference, margin = comparison.statement.reference, comparison.statement.margin
    if not trained:
        return None, "Nothing to choose from yet.", "No arm that trains has finished."
    if len(trained) == 1:
        only = trained[0]
        return None, f"Only {only.name} has a result.", f"{_learned(only)} There is nothing to set it against."
    if not comparison.differences:
        return None, "No verdict yet.", f"The reference, {reference}, has no run that the others could be set against."
    open_arms = [found.arm for found in comparison.differences if found.verdict == "inconclusive"]
    pool = _as_good_as_any(comparison)
    if pool == [reference] and open_arms:
        names = listed(open_arms)
        because = (
            f"The margin of {margin:g} nats lies within the interval of the difference: more seeds or more test rows "
            f"would settle it. {reference} is the one to take until then."
        )
        return None, f"Not settled whether {names} {_are(open_arms)} as good as {reference}.", because
    candidates = [comparison.arm(name) for name in pool]
    choice, because = _cheapest(candidates, margin)
    return choice.name, f"Choose {choice.name} on this machine.", because


def _as_good_as_any(comparison: Comparison) -> list[str]:
    """The best arm of those that are not worse than the reference, and those of them that are not worse than it.

    Each is held against the best by itself: two arms may both be better than the reference and far from equal. If some
    are better than the reference by more than the margin, the best is one of them, not an arm that may be no better.
    """
    margin, reference = comparison.statement.margin, comparison.statement.reference
    clear = [found.arm for found in comparison.differences if found.interval.high < -margin]
    good = [reference, *(found.arm for found in comparison.differences if _is_as_good(found))]
    best = min(clear or good, key=lambda name: _final_loss(comparison.arm(name)))
    as_good = {best, *(found.arm for found in _differences_to(comparison, best) if _is_as_good(found))}
    return [name for name in good if name in as_good]


def _differences_to(comparison: Comparison, arm: str) -> tuple[Difference, ...]:
    if arm == comparison.statement.reference:
        return comparison.differences
    return differences_to(arm, comparison.arms, comparison.statement, comparison.test)


def _is_as_good(found: Difference) -> bool:
    return found.verdict in ("better", "not worse")


def _final_loss(arm: ArmResult) -> float:
    """Behind all others where it is not known or no number."""
    return arm.loss_after if arm.loss_after is not None and math.isfinite(arm.loss_after) else math.inf


def _cheapest(candidates: Sequence[ArmResult], margin: float) -> tuple[ArmResult, str]:
    if len(candidates) == 1:
        return candidates[0], f"No other arm was shown to be as good by the margin of {margin:g} nats."
    as_good = f"By the margin of {margin:g} nats {_named(candidates)} are equally good on held-out rows"
    fastest = max(candidates, key=lambda arm: arm.tokens_per_second or 0.0)
    as_fast = [arm for arm in candidates if _alike(arm.tokens_per_second, fastest.tokens_per_second)]
    if len(as_fast) == 1:
        return fastest, f"{as_good}; {fastest.name} is the fastest."
    smallest = min(as_fast, key=lambda arm: needed_bytes(arm) or 0)
    as_small = [arm for arm in as_fast if _alike(needed_bytes(arm), needed_bytes(smallest))]
    if len(as_small) == 1:
        return smallest, f"{as_good}; of {_named(as_fast)}, which are as fast, {smallest.name} takes the least memory."
    best = min(as_small, key=_final_loss)
    return best, f"{as_good}; of {_named(as_small)}, which cost about the same, {best.name} has the lowest mean loss."


def _named(arms: Sequence[ArmResult]) -> str:
    return listed([arm.name for arm in arms])


def _alike(value: float | None, other: float | None) -> bool:
    """What was not measured tells no arm from another."""
    return not value or not other or alike(value, other)


def _against_reference(comparison: Comparison, found: Difference) -> str:
    arm, reference = comparison.arm(found.arm), comparison.arm(found.reference)
    share = f"{abs(found.mean) / reference.loss_after:.1%} of its loss; " if reference.loss_after else ""
    loss = (
        f"{arm.name} ended {apart(found.mean)} {reference.name} "
        f"({share}{level(found.interval)} interval {between(found.interval)}): {meaning(found)}."
    )
    costs = [text for text in (memory_beside(arm, reference), speed_beside(arm, reference)) if text]
    return f"{loss} It {listed(costs)}." if costs else loss


def _if_memory_binds(comparison: Comparison, trained: Sequence[ArmResult], choice: str | None) -> list[str]:
    measured = [arm for arm in trained if needed_bytes(arm)]
    useful = [arm for arm in measured if not _is_worse_than_untrained(comparison, arm)]
    if len(measured) < 2 or not useful:
        return []
    lean = _leanest(useful)
    chosen = comparison.arm(choice or comparison.statement.reference)
    need, own = needed_bytes(lean) or 0, needed_bytes(chosen)
    if lean is chosen:
        less = f"no arm that learned needs much less than its {size(need)}"
        return [f"Where memory binds, {lean.name} is the choice too: {less}."]
    if not own or need >= own or alike(need, own):
        return []
    cost = apart((lean.loss_after or 0.0) - (chosen.loss_after or 0.0))
    here = f"{chosen.name} took {size(own)} of this machine's {size(comparison.machine.memory_bytes)}"
    saved = f"{1 - need / own:.0%} less ({size(need)})"
    return [f"{here}. Where memory binds, take {lean.name}: {saved}, its held-out loss {cost} {chosen.name}'s."]


def _leanest(arms: Sequence[ArmResult]) -> ArmResult:
    """Of the arms that take about the least memory, the one with the lowest loss: a few bytes are worth no nats."""
    least = min(needed_bytes(arm) or 0 for arm in arms)
    return min((arm for arm in arms if alike(needed_bytes(arm) or 0, least)), key=_final_loss)


def _is_worse_than_untrained(comparison: Comparison, arm: ArmResult) -> bool:
    """Than the base, where that is an arm; else than what the arm itself began with, where that was measured."""
    base = next((one.loss_after for one in comparison.arms if not one.trainable and one.finished), None)
    untrained = arm.loss_before if base is None else base
    return untrained is not None and _final_loss(arm) > untrained


def _merging(trained: Sequence[ArmResult]) -> list[str]:
    """By the weights that an adapter does best in."""
    changes: dict[str, list[str]] = {}
    for arm in trained:
        if arm.merges:
            best = min(arm.merges, key=lambda merge: merge.merged_loss)
            change = f"{arm.name} ({signed(best.merged_loss - best.adapter_loss)} nats from its adapter)"
            changes.setdefault(best.base, []).append(change)
    return [f"Best merged into the {base} weights: {listed(arms)}." for base, arms in changes.items()]


def _learned(arm: ArmResult) -> str:
    if arm.gain is None or arm.loss_before is None or arm.loss_after is None:
        return ""
    verb = "fell" if arm.gain > 0 else "rose"
    return f"Its held-out loss {verb} from {arm.loss_before:.4f} to {arm.loss_after:.4f} nats a token."


def _cautions(comparison: Comparison, trained: Sequence[ArmResult]) -> list[str]:
    cautions = []
    seeds = min((len(found.seeds) for found in comparison.differences), default=_FEW_SEEDS)
    if seeds == 1:
        cautions.append("One seed: intervals show how test rows differ, not how runs would if they were repeated.")
    elif seeds < _FEW_SEEDS:
        cautions.append(f"{plural(seeds, 'seed')}: an interval over so few is wide.")
    if comparison.test == comparison.validation:
        cautions.append("The same rows chose checkpoints and gave the results: no others are held out.")
    if duplicates := comparison.test.duplicates:
        are = "is a training row" if duplicates == 1 else "are training rows"
        cautions.append(
            f"{duplicates} of {plural(comparison.test.rows, 'test row')} {are} too: losses on them flatter."
        )
    cautions += [
        f"{arm.name} did not get better by training. {_learned(arm)}"
        for arm in trained
        if arm.gain is not None and arm.gain <= 0
    ]
    cautions += [text for arm in comparison.arms for text in _edge_of_sweep(arm)]
    for arm in comparison.arms:
        if arm.status != "finished":
            state = "failed" if arm.status == "failed" else "is unfinished"
            cautions.append(f"{arm.name} {state}{f': {arm.error}' if arm.error else ''}.")
        lost = [f"seed {run.seed}" for run in arm.runs if run.status == "failed"]
        if lost and arm.finished:
            cautions.append(f"{arm.name} failed with {listed(lost)}, which its figures leave out.")
        cautions += [f"{arm.name}, seed {run.seed}, once measured: {run.error}" for run in arm.finished if run.error]
    return [*cautions, *(f"Changed after results were there: {change}" for change in comparison.statement.changes)]


def _edge_of_sweep(arm: ArmResult) -> list[str]:
    """The best learning rate tried may not be the best there is; next to one that diverged it is no end."""
    tried = sorted(point.learning_rate for point in arm.sweep)
    if len(tried) < 2 or arm.learning_rate not in (tried[0], tried[-1]):
        return []
    which = "lowest" if arm.learning_rate == tried[0] else "highest"
    return [
        f"{arm.name} did best at the {which} learning rate tried, {arm.learning_rate:g}: a wider sweep may find better."
    ]


def _are(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
