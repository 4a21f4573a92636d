"""What `nybble plan` is asked: one run on one card, or on cards of all sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nybble.config import RunConfig
from nybble.planner.advice import Advice, Method, advise
from nybble.planner.cards import DeviceSpec, card
from nybble.planner.overview import CARDS, Overview
from nybble.planner.report import Report
from nybble.planner.shapes import ModelShape, gpt3
from nybble.planner.solve import Solution, micro_batches
from nybble.train.plan import Rows, RunPlan, choices, plan_run, run_shape, trained_parameters

_WORTH_SAYING = 1.03  # of a step's speed in other micro-batches
GPT3 = "gpt3"


def shape_of(name: str, config: Mapping[str, Any] | None) -> ModelShape:
    """The sizes in a config.json, or the published ones of GPT-3, of which there is none."""
    return gpt3() if config is None and name == GPT3 else ModelShape.from_config(config or {})


def plan_report(config: RunConfig, shape: ModelShape, device: DeviceSpec) -> Report:
    """The plan of a run whose rows are all as long as `data.max_length` allows."""
    plan = _plan(config, shape, device)
    assert plan.solution is not None
    return Report(
        config.model.name,
        trained_parameters(config, shape),
        shape.parameters,
        device,
        plan.solution,
        _advice(config, shape, device),
        _faster_split(config, shape, device, plan),
    )


def plan_overview(config: RunConfig, shape: ModelShape) -> Overview:
    """The run on one card of each size."""
    rows = []
    for device in map(card, CARDS):
        solution = _plan(config, shape, device).solution
        assert solution is not None
        rows.append((device, solution))
    run = rows[0][1].run
    return Overview(f"{config.model.name}, {config.method}, {run.batch} x {run.seq_len:,} tokens at a time", rows)


def _plan(config: RunConfig, shape: ModelShape, device: DeviceSpec) -> RunPlan:
    return plan_run(config, shape, device, rows=_rows(config, shape))


def _rows(config: RunConfig, shape: ModelShape) -> Rows:
    length = config.data.length_within(shape.max_positions or None)
    held_out = config.data.validation_fraction or config.data.validation_path or config.data.validation_split
    return Rows(length, length if held_out else 0, samples=2 if config.data.packing else 1)


def _advice(config: RunConfig, shape: ModelShape, device: DeviceSpec) -> Advice | None:
    if config.method == "full":
        return None

    def solve(method: Method, memory_bytes: int | None) -> Solution:
        model = config.model.model_copy(update={"storage": "auto"})
        memory = config.memory if memory_bytes is None else config.memory.model_copy(update={"budget": "all"})
        changed = config.model_copy(update={"method": method, "model": model, "memory": memory})
        on = device if memory_bytes is None else device.with_memory(memory_bytes)
        solution = _plan(changed, shape, on).solution
        assert solution is not None
        return solution

    return advise(solve)


def _faster_split(config: RunConfig, shape: ModelShape, device: DeviceSpec, plan: RunPlan) -> Solution | None:
    if plan.stock is not None or plan.solution is None:
        return None
    run = run_shape(config, shape, _rows(config, shape))
    _, found = micro_batches(shape, run, device, choices(config, shape))
    gain = found.prediction.tokens_per_second / plan.solution.prediction.tokens_per_second
    return found if found.fits and gain > _WORTH_SAYING else None
