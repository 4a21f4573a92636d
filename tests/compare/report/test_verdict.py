"""What the report advises, and what it warns of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from nybble.compare.report.verdict import give_verdict
from nybble.compare.result import Advice, ArmResult, Comparison, PhaseMemory, Sweep
from tests.compare.report.sample import MIB, comparison


def changed(found: Comparison, name: str, change: Callable[[ArmResult], ArmResult]) -> Comparison:
    return replace(found, arms=tuple(change(arm) if arm.name == name else arm for arm in found.arms))


def costing(arm: ArmResult, *, mib: int, speed: float) -> ArmResult:
    memory = (PhaseMemory("train", 2**30, mib * MIB),)
    return replace(arm, runs=tuple(replace(run, memory=memory, tokens_per_second=speed) for run in arm.runs))


def compared(of_lora: tuple[int, float], of_qlora: tuple[int, float], *, qlora: float) -> Comparison:
    """Each arm by its memory in MiB and its speed."""
    found = comparison({"base": 2.8, "lora": 1.55, "qlora": qlora})
    found = changed(found, "lora", lambda arm: costing(arm, mib=of_lora[0], speed=of_lora[1]))
    return changed(found, "qlora", lambda arm: costing(arm, mib=of_qlora[0], speed=of_qlora[1]))


def test_an_arm_that_is_worse_is_not_chosen_but_named_for_where_memory_binds() -> None:
    verdict = give_verdict(compared((2000, 100.0), (1000, 150.0), qlora=1.59))
    assert verdict.choice == "lora"
    assert verdict.because == "No other arm was shown to be as good by the margin of 0.01 nats."
    assert verdict.points[0].startswith("qlora ended 0.0398 nats above lora (")
    assert "2.6% of its loss; 95% interval +0.03" in verdict.points[0]
    assert "takes 50% less memory (1000.00 MiB, not 1.95 GiB)" in verdict.points[0]
    assert "is 50% faster (150 tokens/s, not 100)" in verdict.points[0]
    assert (
        "lora took 1.95 GiB of this machine's 80.00 GiB. Where memory binds, take qlora: 50% less" in verdict.points[1]
    )


def test_an_arm_with_the_lower_loss_is_told_to_have_ended_below() -> None:
    verdict = give_verdict(compared((2000, 100.0), (1000, 150.0), qlora=1.51))
    assert verdict.points[0].startswith("qlora ended 0.0402 nats below lora (")


def test_an_arm_whose_loss_is_no_number_is_never_advised() -> None:
    found = where_memory_binds({"base": 5.0, "pissa": math.nan, "lora": 1.55, "qlora": 1.69})
    assert "Where memory binds, take qlora" in found


def test_where_memory_binds_a_few_bytes_are_worth_no_loss() -> None:
    found = where_memory_binds({"base": 5.0, "lora": 1.55, "qlora": 1.69, "pissa": 4.48})
    assert "Where memory binds, take qlora: 43% less (1.08 GiB), its held-out loss 0.1" in found


@pytest.mark.parametrize("base", [{"base": 2.8}, {}])
def test_where_memory_binds_no_arm_is_taken_that_is_worse_than_the_untrained_model(base: dict[str, float]) -> None:
    found = where_memory_binds({**base, "lora": 1.55, "qlora": 1.69, "pissa": 4.48}, pissa_mib=500, before=2.8)
    assert "Where memory binds, take qlora: 43% less" in found
    assert "pissa" not in found


def test_where_memory_binds_nothing_is_said_of_arms_that_did_not_learn() -> None:
    found = comparison({"base": 1.2, "lora": 1.55, "qlora": 1.59})
    assert not any("Where memory binds" in point for point in give_verdict(found).points)


def where_memory_binds(ends: dict[str, float], *, pissa_mib: int = 1096, before: float = 6.0) -> str:
    """What is said of arms that need 1.90, 1.08 and by default 1.07 GiB."""
    found = comparison(ends)
    for name, mib in (("lora", 1946), ("qlora", 1106), ("pissa", pissa_mib)):
        found = changed(found, name, lambda arm, mib=mib: costing(arm, mib=mib, speed=100.0))  # type: ignore[misc]
    runs = tuple(replace(run, loss_before=before) for run in found.arm("pissa").runs)
    found = changed(found, "pissa", lambda arm: replace(arm, runs=runs))
    (point,) = [point for point in give_verdict(found).points if "Where memory binds" in point]
    return point


def test_of_equally_good_arms_the_fastest() -> None:
    verdict = give_verdict(compared((2000, 150.0), (1000, 100.0), qlora=1.5515))
    assert verdict.choice == "lora"
    assert "lora is the fastest" in verdict.because


def test_of_equally_good_and_fast_arms_the_smallest() -> None:
    verdict = give_verdict(compared((2000, 150.0), (1000, 146.0), qlora=1.5515))
    assert verdict.choice == "qlora"
    assert "qlora takes the least memory" in verdict.because
    assert any("qlora is the choice too" in point for point in verdict.points)


def test_of_arms_that_cost_the_same_the_best() -> None:
    found = compared((1000, 150.0), (1000, 146.0), qlora=1.5515)
    assert give_verdict(found).choice == min(("lora", "qlora"), key=lambda name: found.arm(name).loss_after or 0)


def test_arms_better_by_more_than_the_margin_leave_no_other() -> None:
    verdict = give_verdict(compared((1000, 150.0), (3000, 90.0), qlora=1.5))
    assert verdict.choice == "qlora"
    assert "3.2% of its loss" in verdict.points[0]
    assert "): better, as the whole interval lies below 0. It takes 200% more memory" in verdict.points[0]


def test_arms_better_than_the_reference_are_held_against_each_other() -> None:
    """Not called equal because both beat the reference, be the better one the dearer by far."""
    found = comparison({"base": 4.0, "lora": 3.0, "loftq": 2.49, "full": 1.1})
    found = changed(found, "loftq", lambda arm: costing(arm, mib=1000, speed=150.0))
    found = changed(found, "full", lambda arm: costing(arm, mib=9000, speed=20.0))
    verdict = give_verdict(found)
    assert (verdict.choice, verdict.headline) == ("full", "Choose full on this machine.")
    assert verdict.because == "No other arm was shown to be as good by the margin of 0.01 nats."


def test_an_arm_no_worse_than_the_reference_may_be_worse_than_the_best() -> None:
    found = comparison({"lora": 1.55, "qlora": 1.5535, "full": 1.5435})
    assert [one.verdict for one in found.differences] == ["not worse", "better"]
    verdict = give_verdict(changed(found, "qlora", lambda arm: costing(arm, mib=100, speed=9e6)))
    assert verdict.choice != "qlora"


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2, 3, 4)])
def test_of_arms_as_good_as_the_best_the_cheapest(seeds: tuple[int, ...]) -> None:
    found = comparison({"lora": 3.0, "loftq": 1.1002, "full": 1.1}, seeds=seeds)
    found = changed(found, "loftq", lambda arm: costing(arm, mib=1000, speed=150.0))
    found = changed(found, "full", lambda arm: costing(arm, mib=9000, speed=20.0))
    verdict = give_verdict(found)
    assert verdict.choice == "loftq"
    assert "loftq and full are equally good on held-out rows; loftq is the fastest." in verdict.because


def test_what_is_not_settled_is_said_to_be() -> None:
    verdict = give_verdict(compared((1000, 100.0), (500, 100.0), qlora=1.56))
    assert verdict.choice is None
    assert verdict.headline == "Not settled whether qlora is as good as lora."
    assert "more seeds or more test rows" in verdict.because


@pytest.mark.parametrize(
    ("keep", "headline"),
    [
        ((), "Nothing to choose from yet."),
        (("qlora",), "Only qlora has a result."),
        (("qlora", "full"), "No verdict yet."),
    ],
)
def test_what_did_not_finish_gives_no_verdict(keep: tuple[str, ...], headline: str) -> None:
    found = comparison({"base": 2.8, "lora": 1.55, "qlora": 1.59, "full": 1.5})
    arms = tuple(
        arm if arm.name in ("base", *keep) else replace(arm, status="failed", error="out of memory", runs=())
        for arm in found.arms
    )
    verdict = give_verdict(replace(found, arms=arms, differences=()))
    assert (verdict.choice, verdict.headline) == (None, headline)
    assert "lora failed: out of memory." in verdict.cautions


def test_the_base_best_merged_into_is_named() -> None:
    verdict = give_verdict(comparison({"lora": 1.55, "qlora": 1.59}))
    assert "Best merged into the original weights: lora (+0.0003 nats from its adapter) and qlora" in verdict.points[-1]


def test_cautions() -> None:
    found = comparison({"lora": 1.55, "qlora": 1.59}, seeds=(0,))
    found = replace(found, validation=found.test)
    found = replace(found, statement=replace(found.statement, changes=("margin 0.005 -> 0.01",)))
    unmerged = replace(found.arms[0].runs[0], error="merging: the disk is full")
    found = changed(found, "lora", lambda arm: replace(arm, learning_rate=0.004, runs=(unmerged,)))
    lost = replace(found.arms[1].runs[0], seed=1, status="failed", error="no memory")
    found = changed(found, "qlora", lambda arm: replace(arm, runs=(*arm.runs, lost)))
    verdict = give_verdict(found)
    for part in (
        "One seed",
        "The same rows chose checkpoints and gave the results",
        "lora did best at the highest learning rate tried, 0.004",
        "qlora failed with seed 1",
        "lora, seed 0, once measured: merging: the disk is full",
        "Changed after results were there: margin 0.005 -> 0.01",
    ):
        assert said(verdict, part), part


@pytest.mark.parametrize(("duplicates", "words"), [(1, "1 of {} is a training row"), (3, "3 of {} are training rows")])
def test_test_rows_that_are_trained_on_are_a_caution(duplicates: int, words: str) -> None:
    found = comparison({"base": 2.8, "lora": 1.55, "qlora": 1.59})
    found = replace(found, test=replace(found.test, duplicates=duplicates))
    rows = f"{len(found.test.target_tokens)} test rows"
    assert give_verdict(found).cautions == (f"{words.format(rows)} too: losses on them flatter.",)


def test_a_clean_comparison_has_no_cautions() -> None:
    assert not give_verdict(comparison({"base": 2.8, "lora": 1.55, "qlora": 1.59})).cautions


def test_an_arm_that_learned_nothing_is_named() -> None:
    found = changed(
        comparison({"lora": 1.55, "qlora": 1.59}),
        "qlora",
        lambda arm: replace(arm, runs=tuple(replace(run, loss_before=1.2) for run in arm.runs)),
    )
    assert said(
        give_verdict(found), "qlora did not get better by training. Its held-out loss rose from 1.2000 to 1.5889"
    )


def test_nothing_is_said_of_a_gain_that_is_not_known() -> None:
    found = changed(
        comparison({"base": 2.8, "lora": 1.55, "qlora": 1.59}),
        "qlora",
        lambda arm: replace(arm, runs=tuple(replace(run, loss_before=None) for run in arm.runs)),
    )
    assert not give_verdict(found).cautions


@pytest.mark.parametrize(
    ("losses", "best", "end"), [((1.6, 1.55, None), 3e-4, None), ((1.55, None, None), 1e-4, "lowest")]
)
def test_ends_of_a_sweep_are_rates_that_were_tried_be_it_that_they_diverged(
    losses: tuple[float | None, ...], best: float, end: str | None
) -> None:
    sweep = tuple(Sweep(rate, 0, loss) for rate, loss in zip((1e-4, 3e-4, 1e-3), losses, strict=True))
    found = comparison({"base": 2.8, "lora": 1.55, "qlora": 1.59})
    found = changed(found, "lora", lambda arm: replace(arm, learning_rate=best, sweep=sweep))
    wider = f"lora did best at the {end} learning rate tried, {best:g}: a wider sweep may find better."
    assert give_verdict(found).cautions == ((wider,) if end else ())


def said(verdict: Advice, part: str) -> bool:
    return any(part in caution for caution in verdict.cautions)
