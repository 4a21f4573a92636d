"""What a prediction is used for during a run and after it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nybble.config import RunConfig
from nybble.memory.budget import Peak
from nybble.planner.cards import card
from nybble.planner.solve import Solution
from nybble.train import predicted
from nybble.train.loop import StepResult
from nybble.train.plan import Rows, RunPlan, plan_run
from nybble.train.predicted import compared, figures, steady_speed, suggestion, window_bytes
from tests.planner.predictions import GIB, prediction
from tests.train.test_plan import LLAMA

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def config_of(**changes: str) -> RunConfig:
    return RunConfig.read(None, {"model.name": "m", "data.path": "d", "output": "o"} | changes)


def plan_of(model: dict[str, object] = LLAMA) -> RunPlan:
    return plan_run(config_of(), model, card("h100"), rows=Rows(512))


def paged() -> RunPlan:
    plan = plan_of()
    return replace(plan, memory=replace(plan.memory, moments="paged"))


def steps(*seconds: float) -> list[StepResult]:
    return [StepResult(n, 1.0, 90, 1.0, 1e-4, seconds=s, peak_bytes=0, tokens=100) for n, s in enumerate(seconds, 1)]


def test_speed_is_that_of_the_median_step_after_the_first() -> None:
    assert steady_speed(steps(9, 9, 9, 0.5, 1.0, 2.0)) == 100
    assert steady_speed(steps(1, 1, 1)) is None


def test_the_run_is_held_against_its_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of()
    assert plan.solution is not None
    expected = plan.solution.prediction.peak_bytes
    monkeypatch.setattr(predicted, "peak", lambda _: Peak(expected // 2, int(0.97 * expected) - GIB // 8, GIB // 8))
    (line,) = compared(plan, steps(1, 1, 1, 0.01), CUDA)
    assert "predicted (-3.0%); 10,000 tokens/s of " in line
    assert compared(replace(plan, on_gpu=False), steps(1, 1, 1, 1), CPU) == []
    assert compared(plan_of({"model_type": "unheard of"}), steps(1), CUDA) == []


@pytest.mark.parametrize("changes", [{}, {"memory.moments": "paged"}], ids=["auto", "fixed"])
@pytest.mark.parametrize("fits", [True, False])
def test_out_of_memory_suggests_the_plan_for_less(
    monkeypatch: pytest.MonkeyPatch, fits: bool, changes: dict[str, str]
) -> None:
    plan = plan_of()
    assert plan.solution is not None
    smaller = Solution(plan.solution.run, prediction(), 20 * GIB, 64 * GIB, fits, plan.memory)
    asked: list[int | None] = []

    def solve(*arguments: object) -> Solution:
        asked.append(arguments[-1].budget_bytes)  # type: ignore[attr-defined]
        return smaller

    monkeypatch.setattr("nybble.train.plan.solve", solve)
    monkeypatch.setattr(predicted, "peak", lambda _: Peak(0, 19 * GIB, GIB))
    lines = suggestion(config_of(**changes), plan, CUDA).splitlines()
    assert asked == [int(0.98 * 18 * GIB)]  # a little is spared
    assert lines[0] == "Any of these helps:"
    settings = [line.split("=")[0].strip() for line in lines[1:]]
    assert settings == [*(["memory.budget"] if fits else []), "train.batch_size", "data.max_length"]
    if fits:
        alone = " without memory.moments" if changes else ""
        plan_in_words = "activations kept in 20, recomputed in 12 of 32 layers; "
        assert lines[1].startswith(f"  memory.budget=18.0GiB{alone}: {plan_in_words}")
        assert lines[1].endswith(" (19.88 GiB, 16,400 tokens/s)")


def test_without_a_prediction_settings_are_suggested() -> None:
    assert "memory.budget=" not in suggestion(config_of(), plan_of({"model_type": "unheard of"}), CPU)


def test_longer_windows_need_more() -> None:
    needed = window_bytes(paged())
    assert needed is not None
    short, long = torch.Size((1, 64)), torch.Size((2, 2048))
    assert needed((short, long)) == needed((long,)) > needed((short,)) > 0
    assert needed((torch.Size((1, 65)),)) == needed((torch.Size((1, 128)),))


def test_nobody_asks_where_moments_stay() -> None:
    assert window_bytes(plan_of()) is None
    assert window_bytes(plan_of({"model_type": "unheard of"})) is None


def test_figures_are_of_the_plan() -> None:
    found = figures(plan_of())
    layers = found["predicted"]["prediction"]["plan"]["layers"]
    assert found["plan"]["layers"] == layers
    assert sum(entry["number"] for entry in layers) == LLAMA["num_hidden_layers"]
    unknown = figures(plan_of({"model_type": "unheard of", "n_layer": 2}))
    assert unknown["predicted"] is None
    assert unknown["plan"]["layers"] == [{"number": 2, "activations": "recompute", "weights": "resident"}]
