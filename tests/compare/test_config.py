"""Arms: built in, or of a file."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from nybble.compare.config import Arm, CompareConfig, read_arms
from nybble.compare.folder import Failure, Trained
from nybble.compare.layout import Layout
from nybble.compare.result import Curve, Sweep
from nybble.config import RunConfig
from nybble.errors import UserError

FILE = """
seeds: 3
margin: 0.02
learning_rates: [1e-4, 1e-3]
arms:
  base:
  small: {method: qlora, lora.r: 4, learning_rates: [2e-3]}
  attention:
    method: lora
    lora: {r: 8, target_modules: [q_proj, v_proj]}
    optim.learning_rate: 5e-4
  full:
"""


@pytest.fixture
def shared() -> RunConfig:
    return RunConfig.read(None, {"model.name": "m", "data.path": "d", "output": "o", "lora.lora_alpha": 5})


def test_arms_are_in_one_order_whatever_was_typed() -> None:
    assert [arm.name for arm in read_arms("qlora, base").arms] == ["base", "qlora"]


@pytest.mark.parametrize("text", ["", "lora,loraa", ","])
def test_unknown_arms(text: str) -> None:
    with pytest.raises(UserError, match="no such arm"):
        read_arms(text)


def test_arms_of_a_file(tmp_path: Path, shared: RunConfig) -> None:
    (tmp_path / "arms.yaml").write_text(FILE)
    compare = read_arms(str(tmp_path / "arms.yaml"), {"margin": 0.03})
    assert (compare.seeds, compare.margin, compare.reference_name) == (3, 0.03, "small")
    base, small, attention, full = compare.arms
    assert not base.trained
    configs = {arm.name: arm.config(shared) for arm in compare.arms}
    assert (configs["small"].method, configs["small"].lora.r, configs["small"].lora.lora_alpha) == ("qlora", 4, 5)
    assert configs["attention"].lora.target_modules == ("q_proj", "v_proj")
    assert configs["full"].method == "full"
    assert [compare.rates_of(arm) for arm in (base, small, attention, full)] == [(), (0.002,), (), (0.0001, 0.001)]
    assert compare.sweeps


@pytest.mark.parametrize(
    ("arms", "problem"),
    [
        ("arms: {a: {data.path: elsewhere}}", "which all arms share"),
        ("arms: {a: {train: {seed: 3}}}", "train.seed, which all arms share"),
        ("arms: {a/b: {method: lora}}", "cannot name an arm"),
        ("arms: {a: {method: lora}}\nreference: b", r"is no arm that is trained\Z"),
        ("arms: {a: 3}", "are no sections"),
        ("arms: [lora]", "must hold arms"),
        ("arms: {lora: }\nseed: 3", "did you mean 'seeds'"),
        ("arms: {lora: }\nlearning_rates: [1.0e-4, -1]", "learning_rates.1: .* greater than 0"),
        ("arms: {a: {method: lora, learning_rates: [0]}}", "learning_rates.0: .* greater than 0"),
    ],
)
def test_files_that_are_not_valid(tmp_path: Path, arms: str, problem: str) -> None:
    (tmp_path / "arms.yaml").write_text(arms)
    with pytest.raises(UserError, match=problem):
        read_arms(str(tmp_path / "arms.yaml"))


def test_a_misspelt_setting_of_an_arm_is_told(shared: RunConfig) -> None:
    with pytest.raises(UserError, match="did you mean 'lora_alpha'") as caught:
        Arm(name="a", overrides={"lora.alpha": 3}).config(shared)
    assert caught.value.where == "arm a"


def test_where_runs_lie_and_with_which_settings(shared: RunConfig) -> None:
    arms = (
        Arm.built_in("base"),
        Arm.built_in("lora"),
        Arm(name="q", overrides={"method": "qlora"}, learning_rates=(0.1, 0.2)),
    )
    layout = Layout(shared, CompareConfig(arms=arms, seeds=2), Path("out"))
    assert [str(run.folder.path) for run in layout.all_runs()] == [
        "out/base",
        "out/lora/seed-0",
        "out/lora/seed-1",
        "out/q/lr-0.1/seed-0",
        "out/q/lr-0.1/seed-1",
        "out/q/lr-0.2/seed-0",
        "out/q/lr-0.2/seed-1",
    ]
    last = layout.all_runs()[-1].config
    assert (last.train.seed, last.optim.learning_rate, last.output) == (1, 0.2, "out/q/lr-0.2/seed-1")
    assert layout.results(arms[2]) == []  # until both rates were tried


@pytest.mark.parametrize(("losses", "chosen"), [((math.nan, 1.5, 1.25), 0.3), ((math.nan,) * 3, None)])
def test_a_loss_that_is_not_finite_chooses_no_rate(
    shared: RunConfig, tmp_path: Path, losses: tuple[float, ...], chosen: float | None
) -> None:
    layout = Layout(shared, read_arms("lora", {"learning_rates": (0.1, 0.2, 0.3)}), tmp_path)
    (lora,) = layout.compare.arms
    for run, loss in zip(layout.sweep(lora), losses, strict=True):
        run.folder.begin()
        run.folder.finish_training(Trained("bf16", 5, 50, 500, 20, 8, 80, validation_loss=loss))
    assert layout.chosen_rate(lora) == chosen


def test_only_a_rate_that_was_evaluated_counts_as_tried(shared: RunConfig, tmp_path: Path) -> None:
    layout = Layout(shared, read_arms("lora", {"learning_rates": (0.1, 0.2, 0.3)}), tmp_path)
    (lora,) = layout.compare.arms
    diverged = Curve(validation_steps=(0, 1), validation_losses=(2.0, math.nan))
    done = {"validation_loss": 1.5}, {"curve": diverged}, {}  # the last without rows to choose by
    for run, facts in zip(layout.sweep(lora), done, strict=True):
        run.folder.begin()
        run.folder.finish_training(Trained("bf16", 5, 50, 500, 20, 8, 80, **facts))
    assert layout.swept(lora) == [Sweep(0.1, 0, 1.5), Sweep(0.2, 0, None)]
    layout.sweep(lora)[2].folder.fail(Failure("it was killed"))
    assert layout.swept(lora)[2] == Sweep(0.3, 0, None, "it was killed")


def test_the_example_is_valid(shared: RunConfig) -> None:
    compare = read_arms(str(Path(__file__).parents[2] / "examples" / "arms.yaml"))
    methods = {arm.name: arm.config(shared).method for arm in compare.arms}
    assert methods["attention-only"] == "qlora"
    assert methods["full"] == "full"
    assert compare.rates_of(compare.arms[-1]) == (1e-5, 3e-5, 1e-4)
