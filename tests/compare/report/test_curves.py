"""Loss curves over seeds, and how they are drawn."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from statistics import fmean

import pytest

from nybble.compare.report import tables
from nybble.compare.report.curves import training_curve, validation_curve
from nybble.compare.report.lines import loss_panels
from nybble.compare.result import ArmResult, Curve
from tests.compare.report.sample import arm, comparison

ENDS = {"base": 2.8, "lora": 1.55, "qlora": 1.59, "full": 1.549}


def changed(of: ArmResult, *curves: Curve) -> ArmResult:
    return replace(of, runs=tuple(replace(run, curve=curve) for run, curve in zip(of.runs, curves, strict=True)))


@pytest.fixture
def three() -> ArmResult:
    return arm(random.Random(3), "lora", 1.5, seeds=(0, 1, 2))


def test_a_point_has_mean_best_and_worst_of_the_seeds(three: ArmResult) -> None:
    points = validation_curve(three)
    assert len(points) == 11
    for n, point in enumerate(points):
        values = [run.curve.validation_losses[n] for run in three.runs]
        assert (point.mean, point.low, point.high) == (fmean(values), min(values), max(values))
        assert point.seconds == pytest.approx(0.03 * point.step)


def test_training_losses_are_running_means_and_few(three: ArmResult) -> None:
    points = training_curve(three)
    window = round(0.05 * 150)
    assert points[0].step == window
    losses = [fmean(run.curve.losses[:window]) for run in three.runs]
    assert points[0].mean == pytest.approx(fmean(losses))
    assert points[-1].low == pytest.approx(min(fmean(run.curve.losses[-window:]) for run in three.runs))
    steps = tuple(range(1, 5001))
    long = Curve(steps, losses=(1.0,) * 5000, tokens=steps, seconds=tuple(map(float, steps)))
    assert len(training_curve(changed(three, long, long, long))) == 200


def test_steps_that_a_seed_lacks_are_left_out(three: ArmResult) -> None:
    short = replace(three.runs[1].curve, validation_steps=(0, 15), validation_losses=(2.0, 1.9))
    curve = changed(three, three.runs[0].curve, short, three.runs[2].curve)
    assert [point.step for point in validation_curve(curve)] == [0, 15]


def test_lines_lie_within_the_picture_and_bands_around_them() -> None:
    panels = loss_panels(comparison(ENDS))
    assert [panel.title for panel in panels] == [
        "Validation loss by step",
        "Validation loss by step, second half closer",
        "Validation loss by seconds of training",
        "Training loss, running mean, by step",
    ]
    for panel in panels:
        assert [line.name for line in panel.lines] == ["lora", "qlora", "full"]
        for line in panel.lines:
            middle, band = _points(line.path), _points(line.band)
            assert len(band) == 2 * len(middle)
            upper, lower = band[: len(middle)], band[: len(middle) - 1 : -1]
            for (x, y), (upper_x, high), (lower_x, low) in zip(middle, upper, lower, strict=True):
                assert x == upper_x == lower_x
                assert 0 <= high <= y <= low <= 100  # y grows downwards
            assert set(line.marks) <= set(middle)


def test_a_lower_loss_is_drawn_lower() -> None:
    half = loss_panels(comparison(ENDS))[1]
    ends = {line.name: _points(line.path)[-1][1] for line in half.lines}
    assert ends["qlora"] < ends["lora"]


def test_one_seed_has_no_band_and_two_evaluations_no_picture() -> None:
    panels = loss_panels(comparison(ENDS, seeds=(0,), device=False))
    assert all(panel.title.startswith("Training loss") for panel in panels)
    assert not any(line.band for panel in panels for line in panel.lines)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_no_numbers_are_left_out_of_the_pictures(value: float) -> None:
    found = comparison(ENDS)
    base, lora, *others = found.arms
    whole = lora.runs[1].curve
    losses = (*whole.validation_losses[:3], value, *whole.validation_losses[4:])
    curves = [run.curve for run in lora.runs]
    curves[1] = replace(whole, validation_losses=losses)
    without = loss_panels(replace(found, arms=(base, changed(lora, *curves), *others)))
    by_step, half, *_ = loss_panels(found)
    marks = by_step.lines[0].path.split("L")
    assert without[0].lines[0].path.split("L") == marks[:3] + marks[4:]
    assert without[0].lines[1:] == by_step.lines[1:]
    assert without[1] == half  # where all are numbers


def test_tables_have_the_losses_that_pictures_show_each_kind_by_itself() -> None:
    found = comparison(ENDS)
    base, lora, *others = found.arms
    few = [replace(r.curve, validation_steps=(0, 150), validation_losses=(3.0, 1.5)) for r in lora.runs]
    arms = (base, changed(lora, *few), *others)
    validation, seconds, training = tables.curves(replace(found, arms=arms))
    assert validation.title == "Validation loss by step, mean over seeds"
    assert seconds.title == "Seconds of training by step, mean over seeds"
    assert training.title == "Training loss, running mean, by step, mean over seeds"
    assert validation.columns == training.columns == ("step", "lora", "qlora", "full")
    assert [row[1] for row in validation.rows] == ["3.0000", *["-"] * 6, "1.5000"]
    evaluated, trained = validation_curve(others[0]), training_curve(others[0])
    for table, figures in (
        (validation, {point.step: f"{point.mean:.4f}" for point in evaluated}),
        (seconds, {point.step: f"{point.seconds:.1f}" for point in evaluated}),
        (training, {point.step: f"{point.mean:.4f}" for point in trained}),
    ):
        assert [row[2] for row in table.rows] == [figures[int(row[0])] for row in table.rows]
        assert len(table.rows) == 8


def test_without_validation_there_is_a_table_of_training_alone() -> None:
    (training,) = tables.curves(comparison(ENDS, device=False))
    assert training.title.startswith("Training loss")


def test_lines_are_told_apart_without_colour() -> None:
    many = comparison({"lora": 1.5} | {f"arm {n}": 1.5 for n in range(30)}, seeds=(0,))
    lines = loss_panels(many)[0].lines
    assert len({(line.style.dash, line.style.marker) for line in lines}) == len(lines) == 31


def _points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.e]+) ([-\d.e]+)", path)]
