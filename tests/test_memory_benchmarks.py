"""The benchmarks of memory without a GPU: rows, random models, processes, settings drawn by a seed, verdicts."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.plan import LayerPolicy, MemoryPlan
from nybble.quant.format import NF4Spec
from nybble.quant.linear import NF4Linear

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")
MIXED = MemoryPlan(
    (
        LayerPolicy("offload", "streamed"),
        LayerPolicy("recompute", "streamed"),
        LayerPolicy("keep", "streamed"),
        LayerPolicy("keep_matmuls"),
    ),
    embedding="host",
    head="host",
    moments="paged",
)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def work() -> Any:
    import work

    return work


@pytest.fixture
def planned(work: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has the planner return a given plan."""
    plan_run = work.plan_run

    def plan_as(plan: MemoryPlan) -> None:
        def planned(*arguments: Any, **rows: Any) -> Any:
            return dataclasses.replace(plan_run(*arguments, **rows), memory=plan)

        monkeypatch.setattr(work, "plan_run", planned)

    return plan_as


def random_tiny(**options: Any) -> Any:
    from random_model import random_model
    from shapes import shape_config

    return random_model(shape_config("tiny"), device=CPU, spec=NF4Spec(), **options)


def test_shapes_are_the_public_ones() -> None:
    from shapes import shape_config

    from nybble.planner.shapes import ModelShape

    expected = {"1b": 1.236e9, "3b": 3.213e9, "8b": 8.030e9, "70b": 70.554e9, "13b": 13.016e9, "65b": 65.286e9}
    for name, parameters in expected.items():
        assert ModelShape.from_config(shape_config(name).to_dict()).parameters == pytest.approx(parameters, rel=1e-3)
    assert shape_config("8b-2layers").num_hidden_layers == 2


def test_random_weights_are_spread_as_trained_ones_are() -> None:
    from random_model import STD, random_nf4

    for spec in (NF4Spec(), NF4Spec(group_size=0)):
        weight = random_nf4((256, 512), spec, CPU).dequantize(torch.float32)
        assert float(weight.std()) == pytest.approx(STD, rel=0.35)
        assert abs(float(weight.mean())) < 0.1 * STD


def test_random_model_is_whole_and_frozen_and_the_same_wherever_it_lies() -> None:
    one = random_tiny()
    other = random_tiny(plan=MIXED)
    linears = [module for module in one.modules() if isinstance(module, NF4Linear)]
    assert len(linears) == 4 * 7
    ids = torch.randint(0, 320, (2, 24))
    assert torch.equal(one(ids).logits, other(ids).logits)
    assert bool(one(ids).logits.isfinite().all())
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in one.parameters())


def test_only_large_weights_of_a_plan_lie_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    from random_model import _HostMemory

    moved = []

    def place(self: Any, path: str, value: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
        moved.append(path)
        return value

    monkeypatch.setattr(_HostMemory, "place", place)
    random_tiny(plan=MIXED)
    assert len(set(moved)) == 4 * 7 + 2
    assert not [path for path in moved if "norm" in path]


def test_tied_weights_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from shapes import SHAPES

    monkeypatch.setitem(SHAPES, "tiny", SHAPES["tiny"] | {"tie_word_embeddings": True})
    model = random_tiny()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    parted = random_tiny(head_spec=NF4Spec(32))
    assert parted.lm_head.nf4_weight.spec == NF4Spec(32)
    assert parted.model.embed_tokens.weight.shape == (320, 64)
    assert not parted.config.tie_word_embeddings


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_head_is_held_as_it_is_planned(work: Any, method: str) -> None:
    run = work.Run(work.Work.parse(f"tiny 1x16 method={method} model.head=nf4"))
    assert isinstance(run.model.lm_head, NF4Linear)
    assert run.planned.solution.run.nf4_head
    assert run.loss.streamed is not None
    in_nf4 = [module for module in run.model.model.modules() if isinstance(module, NF4Linear)]
    assert len(in_nf4) == (4 * 7 if method == "qlora" else 0)


def test_work_is_written_as_it_is_read(work: Any) -> None:
    text = "8b 2x2048 method=lora lora.r=32 memory.budget=2.5GiB train.gradient_accumulation=2"
    found = work.Work.parse(text)
    assert str(found) == text
    assert found.tokens_a_step == 8192
    assert found.config.lora.r == 32


def test_row_gives_the_same_losses_whatever_the_plan(work: Any, planned: Any) -> None:
    found = []
    for plan in (MemoryPlan.uniform(4), MIXED):
        planned(plan)
        found.append(work.measure("tiny 2x32 train.gradient_accumulation=2 optim.learning_rate=0.01", 2, 1))
    kept, mixed = found
    assert len(kept["loss"]) == 3
    assert len(kept["step_seconds"]) == 2
    assert kept["loss"] == mixed["loss"]
    assert kept["grad_norm"] == mixed["grad_norm"]
    assert mixed["plan"] != kept["plan"]


def test_jobs_are_run_side_by_side_and_none_holds_up_the_others() -> None:
    from jobs import Job, run_jobs

    jobs = [
        Job("slow", time.sleep, (600,), limit_s=0.5),
        Job("dies", os._exit, (3,)),
        Job("fails", int, ("x",)),
        Job("works", dict, ([("loss", [1.0])],)),
        Job("takes the rest", time.sleep, (600,)),
        Job("takes the rest too", time.sleep, (600,)),
        Job("late", dict),
    ]
    assert [row["row"] for row in run_jobs([Job("imports", dict)], [None], time_limit_s=60, imported=["torch"])]
    found = {row["row"]: row for row in run_jobs(jobs, [None, None], time_limit_s=6)}
    assert found.keys() == {job.name for job in jobs}
    assert found["works"]["loss"] == [1.0]
    assert "error" not in found["works"]
    assert found["dies"]["error"] == "exit code 3"
    assert "invalid literal" in found["fails"]["error"]
    assert found["slow"]["error"].startswith("its time was over")
    assert found["late"]["error"].startswith("not begun")


def test_drawn_settings_are_always_the_same_and_can_be_read(work: Any) -> None:
    from plan_check import OPEN, drawn

    rows = drawn(5)
    assert rows == drawn(6)[:5]
    assert len(OPEN) == 10
    for row in (*OPEN, *rows):
        assert str(work.Work.parse(row)) == row
        assert work.Work.parse(row).config.lora.r in (8, 16, 64)


@pytest.mark.parametrize(
    ("predicted", "measured", "expected"),
    [
        (10.0, 10.0, "ok"),
        (10.4, 10.0, "ok"),
        (10.6, 10.0, "OFF"),
        (9.81, 10.0, "ok"),
        (9.79, 10.0, "TOO LOW"),
        (1.14, 1.0, "ok"),  # 150 MiB
        (1.15, 1.0, "OFF"),
    ],
)
def test_prediction_is_judged(predicted: float, measured: float, expected: str) -> None:
    from plan_check import verdict

    assert verdict(predicted, measured) == expected


def test_failed_settings_count_against_the_plan() -> None:
    from plan_check import summary

    rows = [{"verdict": "ok", "off": 0.01}, {"verdict": "OFF", "off": 0.08}, {"error": "out of memory"}]
    assert summary(rows).startswith("1 of 3 ")
    assert summary(rows).endswith("farthest 8.0%")


def test_spike_is_measured_by_length_of_step(planned: Any) -> None:
    from paging import spiked

    planned(MIXED)
    figures = spiked("tiny 1x16 lora.r=4", [16, 16, 16, 64, 16])
    assert len(figures["loss"]) == 5
    assert figures["long_step_s"] == figures["step_seconds"][3]


def test_budget_of_a_spike_has_room_for_short_steps_alone() -> None:
    from paging import budget_of

    graphs, no_graphs = {"peak_before_gib": 8.0}, {"peak_gib": 10.0, "moments_gib": 2.0}
    assert budget_of(graphs, no_graphs) == 9.0
    with pytest.raises(SystemExit, match=r"need 8\.00 GiB, more than 7\.50"):
        budget_of(graphs, no_graphs | {"moments_gib": 5.0})


def test_paged_run_is_compared_with_the_resident_one() -> None:
    from paging import compared

    resident = {"loss": [2.0, 1.0], "short_step_s": 1.0, "long_step_s": 2.0}
    paged = {"loss": [2.0, 1.5], "short_step_s": 1.01, "long_step_s": 2.5}
    assert compared(resident, paged) == {
        "largest_loss_difference": 0.5,
        "short_step_ratio": 1.01,
        "long_step_ratio": 1.25,
    }


def test_host_memory_is_sampled_over_the_steps(planned: Any) -> None:
    from host_growth import growth, shown

    planned(MIXED)
    figures = growth("tiny 1x16", 20)
    assert [step for step, _ in figures["host_gib"]] == list(range(1, 21))
    assert all(held > 0 for _, held in figures["host_gib"])
    assert "20 steps" in shown({**figures, "row": "tiny"})


def test_work_in_words() -> None:
    from memory_tables import describe_work

    text = "70b 2x2048 method=lora lora.r=64 optim.state_bits=8 memory.budget=12GiB train.gradient_accumulation=4"
    assert describe_work(text) == "70B LoRA, 2 x 2,048 x 4, r=64, 8-bit AdamW, within 12 GiB"
    assert describe_work("8b 1x2048 train.precision=fp8") == "8B QLoRA, 1 x 2,048, fp8"
    assert describe_work("8b 1x512 train.cuda_graph=false") == "8B QLoRA, 1 x 512, launched kernel by kernel"


def test_tables_show_what_was_measured_and_what_failed(work: Any, planned: Any) -> None:
    from host_growth import growth
    from memory_tables import MEMORY_TABLES
    from paging import spiked
    from plan_check import checked

    planned(MIXED)
    row = "tiny 1x16 lora.r=4"
    measured: dict[str, dict[str, Any]] = {
        "memory_steps": work.measure(row, 1, 1),
        "memory_long_context": work.measure(row, 1, 0),
        "memory_plan_check": checked(row),
        "memory_paging": spiked(row, [16, 32, 16]),
        "memory_host_growth": growth(row, 10),
    }
    device = {"device_peak_beyond_bytes": 2**28, "device_peak_bytes": 2**28}
    loaded = {"storage": "nf4", "result_bytes": 2**32, "host_peak_beyond_bytes": 2**29, "seconds": 2.5}
    merged = {"base": "original", "output_bytes": 2**32, "host_peak_bytes": 2**29, "seconds": 2.5}
    of_files = {"load_memory": loaded | device, "merge_memory": merged | device}
    assert measured.keys() | of_files.keys() == MEMORY_TABLES.keys()
    for name, figures in of_files.items():
        lines = MEMORY_TABLES[name]([{"shape": "8b", "r": 16, **figures}, {"shape": "8b", "r": 16, "error": "no"}])
        assert lines[2].endswith("| 2.5 |")
        assert "failed" in lines[3]
    for name, figures in measured.items():
        failed = {"row": row, "error": "torch.OutOfMemoryError: CUDA out of memory"}
        lines = MEMORY_TABLES[name]([{"row": row, **figures}, failed])
        columns = {line.count("|") for line in lines if line.startswith("|")}
        assert len(columns) == 1, name
        assert "out of memory" in lines[3], name
        assert "failed" in MEMORY_TABLES[name]([{**failed, "error": "ValueError"}])[2], name


def test_tables_say_which_peaks_are_over_their_budget() -> None:
    from memory_tables import MEMORY_TABLES

    row = {"row": "8b 1x512 memory.budget=5GiB", "peak_allocated_gib": 4.0, "host_peak_gib": 1.0, "plan": "kept"}
    row |= {"step_seconds": [1.0], "tokens_per_second": 512.0, "predicted_gib": 5.0, "notes": []}
    row |= {"loss": [2.0], "grad_norm": [1.0]}
    for name in ("memory_steps", "memory_long_context"):
        within, over = (MEMORY_TABLES[name]([{**row, "peak_gib": peak}])[2] for peak in (5.0, 5.01))
        assert "| 5.00 (4.00) |" in within
        assert "| 5.01 (4.00), over its budget |" in over


def test_tables_say_what_a_step_had_to_give_up(work: Any, planned: Any) -> None:
    from memory_tables import MEMORY_TABLES

    planned(MIXED)
    figures = {"row": "tiny 1x16 lora.r=4", **work.measure("tiny 1x16 lora.r=4", 1, 1)}
    line = "note: the forward pass: out of memory; the step was done again with fewer activations kept"
    lean = {**figures, "notes": [*figures["notes"], f"{line}\n{line}"]}
    as_planned, again = (MEMORY_TABLES["memory_steps"]([row])[2] for row in (figures, lean))
    assert again == as_planned.replace(
        figures["plan"], f"{figures['plan']}; the step was done again with fewer activations kept"
    )
