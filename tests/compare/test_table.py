"""A comparison as JSON values and as a table."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from nybble.compare.result import (
    FORMAT,
    Advice,
    ArmResult,
    Comparison,
    Curve,
    HeldOutRows,
    Interval,
    Machine,
    MergeResult,
    PhaseMemory,
    Sample,
    Score,
    SeedResult,
    Statement,
    Sweep,
    read_comparison,
)
from nybble.compare.statistics import compare_losses
from nybble.compare.table import comparison_lines, comparison_table


def seed_result(seed: int, loss: float, *, device_bytes: int | None = None) -> SeedResult:
    return SeedResult(
        seed,
        f"arm/seed-{seed}",
        "finished",
        loss_before=3.25,
        loss=loss,
        sequence_losses=(loss, 2 * loss),
        curve=Curve((1, 2), (3.0, loss), (10, 20), (0.5, 1.0), (0,), (3.25,)),
        steps=40,
        tokens_per_second=151.4,
        memory=(PhaseMemory("load", 2**30, device_bytes), PhaseMemory("train", 3 * 2**30, device_bytes)),
    )


def arm_result(name: str, *losses: float, device_bytes: int | None = None) -> ArmResult:
    runs = tuple(seed_result(seed, loss, device_bytes=device_bytes) for seed, loss in enumerate(losses))
    return ArmResult(
        name,
        "finished",
        method=name,
        storage="bf16",
        overrides={"method": name},
        config={"method": name},
        learning_rate=0.001,
        trainable=4_880_000,
        total=139_400_000,
        disk_bytes=19 * 2**20,
        runs=runs,
    )


def comparison(*arms: ArmResult) -> Comparison:
    losses = {arm.name: {run.seed: run.sequence_losses for run in arm.finished} for arm in arms}
    pairs = (
        compare_losses((arm.name, losses[arm.name]), ("lora", losses["lora"]), (1, 2), margin=0.01) for arm in arms
    )
    return Comparison(
        FORMAT,
        "out",
        "a title",
        None,
        {},
        Statement("lora", 0.01, 0.95, (0, 1), (), "now"),
        Machine("cpu", "x86", 2**33, 2, {"torch": "2.13"}),
        train_rows=8,
        train_tokens=80,
        validation=HeldOutRows("none", ()),
        test=HeldOutRows("all", (1, 2)),
        arms=arms,
        differences=tuple(found for found in pairs if found and found.arm != "lora"),
        samples=(Sample("why?", "because", {"lora": "so"}),),
    )


def test_a_comparison_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    arm = replace(
        arm_result("lora", 2.0, 2.5),
        sweep=(Sweep(0.1, 0, None, "the loss is nan"),),
        merges=(MergeResult("original", 2.0, 2.01, 0.5),),
        predicted_bytes={"step": {"weights": 5}},
    )
    advice = Advice("lora", "Choose lora.", "It is the best.", ("a point",), ())
    found = replace(comparison(arm, arm_result("qlora", 2.1, 2.4)), verdict=advice)
    assert read_comparison(found.write(tmp_path)) == read_comparison(tmp_path) == found


def test_figures_of_an_arm_are_those_of_its_seeds() -> None:
    arm = arm_result("lora", 2.0, 2.5)
    failed = SeedResult(2, "arm/seed-2", "failed", "it broke")
    arm = replace(arm, runs=(*arm.runs, failed))
    assert (arm.loss_before, arm.loss_after, arm.gain) == (3.25, 2.25, 1.0)
    assert (arm.peak_host_bytes, arm.peak_device_bytes) == (3 * 2**30, None)
    assert arm_result("lora", 2.0, device_bytes=7).peak_device_bytes == 7
    assert arm_result("lora").loss_after is None


def test_the_table_has_a_row_an_arm_and_device_memory_where_there_is_a_device() -> None:
    base = replace(arm_result("base", 3.25), trainable=0)
    text = _text(comparison(base, arm_result("lora", 2.125)))
    assert max(map(len, text.splitlines()[1:])) <= 80
    assert [line.split() for line in text.splitlines() if "bf16" in line] == [
        ["base", "bf16", "-", "3.00", "GiB", "151", "3.250", "-", "-", "19.00", "MiB"],
        ["lora", "bf16", "4.88", "M", "3.5%", "3.00", "GiB", "151", "3.250", "2.125", "1.125", "19.00", "MiB"],
    ]
    assert "device" not in text
    assert "7.00 GiB" in _text(comparison(arm_result("lora", 2.125, device_bytes=7 * 2**30)))


def test_lines_tell_scores() -> None:
    score = Score("exact match", 0.25, Interval(0.2, 0.3, 0.95, "t interval over 2 seeds"), 32)
    (line,) = comparison_lines(comparison(replace(arm_result("lora", 2.0), scores=(score,))))
    assert line == "lora: exact match 0.250 [0.200, 0.300] over 32 answers, 95% intervals"


def test_one_answer_has_no_interval() -> None:
    score = Score.over_questions("ROUGE-L", [0.5])
    (line,) = comparison_lines(comparison(replace(arm_result("lora", 2.0), scores=(score,))))
    assert line == "lora: ROUGE-L 0.500 over 1 answer"


def test_an_arm_without_a_result_says_so() -> None:
    failed = replace(arm_result("qlora"), status="failed", runs=(SeedResult(0, "qlora", "failed", "it broke"),))
    found = comparison(arm_result("lora", 2.0), failed)
    assert "failed" in _text(found)
    assert comparison_lines(found) == ["qlora, seed 0: it broke"]


def test_lines_tell_the_difference_and_how_rates_were_chosen() -> None:
    swept = replace(arm_result("qlora", 2.1, 2.2), sweep=(Sweep(0.001, 0, 2.0), Sweep(1.0, 0, None, "it diverged")))
    lines = comparison_lines(comparison(arm_result("lora", 2.0, 2.1), swept))
    assert lines[0] == "qlora: learning rate 0.001 is the best of 2 by validation rows"
    assert lines[1].startswith(
        "qlora - lora: +0.1000 nats, 95% within [+0.1000, +0.1000] (t interval over 2 seeds): worse"
    )
    assert lines[2] == "qlora, learning rate 1: it diverged"


@pytest.mark.parametrize(
    ("others", "meaning"),
    [
        ((1.9, 2.0), "better, as the whole interval lies below 0"),
        ((2.005, 2.105), "not worse, as the whole interval lies below the margin of 0.01"),
        ((2.2, 2.3), "worse, as the whole interval lies above the margin of 0.01"),
        ((1.9, 2.3), "not settled, as the margin of 0.01 lies within the interval"),
    ],
)
def test_lines_say_what_a_difference_was_judged_by(others: tuple[float, float], meaning: str) -> None:
    (line,) = comparison_lines(comparison(arm_result("lora", 2.0, 2.1), arm_result("qlora", *others)))
    assert line.endswith(f"(t interval over 2 seeds): {meaning}")


def _text(found: Comparison) -> str:
    console = Console(width=100, file=io.StringIO())
    with console.capture() as captured:
        console.print(comparison_table(found))
    return captured.get()
