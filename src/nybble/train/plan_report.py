"""What `nybble plan` is asked: one run on one card, or on cards of all sizes."""

from __future__ import annotations

from nybble.config import RunConfig
from nybble.planner.advice import Advice, Method, advise
from nybble.planner.cards import DeviceSpec, card
from nybble.planner.overview import CARDS, Overview
from nybble.planner.report import Report
from nybble.planner.shapes import ModelShape
from nybble.planner.solve import Solution, faster_split
from nybble.train.plan import Model, Rows, RunPlan, is_quantized, plan_run, spared, trained_parameters


def shape_of(model: Model) -> ModelShape:
    """Raises UserError for a kind of model whose sizes are not known."""
    return model if isinstance(model, ModelShape) else ModelShape.from_config(model)


def plan_report(config: RunConfig, model: Model, device: DeviceSpec) -> Report:
    """The plan of a run whose rows are all as long as `data.max_length` allows."""
    shape = shape_of(model)
    plan = _plan(config, model, device)
    solution = _solution_of(plan)
    return Report(
        config.model.name,
        trained_parameters(config, shape),
        shape.parameters,
        device,
        solution,
        _advice(config, model, device, solution),
        _faster_split(config, model, plan),
    )


def plan_overview(config: RunConfig, model: Model, host_bytes: int | None = None) -> Overview:
    """The run on one card of each size."""
    cards = [card(name) if host_bytes is None else card(name).with_host(host_bytes) for name in CARDS]
    rows = [(device, _solution_of(_plan(config, model, device))) for device in cards]
    run = rows[0][1].run
    return Overview(f"{config.model.name}, {config.method}, {run.batch} x {run.seq_len:,} tokens at a time", rows)


def _plan(config: RunConfig, model: Model, device: DeviceSpec) -> RunPlan:
    return plan_run(config, model, device, rows=_rows(config, shape_of(model)))


def _solution_of(plan: RunPlan) -> Solution:
    assert plan.solution is not None, "the shape is known"
    return plan.solution


def _rows(config: RunConfig, shape: ModelShape) -> Rows:
    length = config.data.length_within(shape.max_positions or None)
    held_out = config.data.validation_fraction or config.data.validation_path or config.data.validation_split
    return Rows(length, length if held_out else 0, samples=2 if config.data.packing else 1)


def _advice(config: RunConfig, model: Model, device: DeviceSpec, own: Solution) -> Advice | None:
    if config.method == "full" or is_quantized(model):  # which has no 16-bit weights to take
        return None

    def solve(method: Method) -> Solution:
        if method == config.method:
            return own
        return _solution_of(_plan(config.changed({"method": method, "model.storage": "auto"}), model, device))

    return advise(solve, shape_of(model), device)


def _faster_split(config: RunConfig, model: Model, plan: RunPlan) -> Solution | None:
    """The same step in other micro-batches, if that is faster, or fits where the run does not."""
    shape, own = shape_of(model), _solution_of(plan)
    if not own.run.is_fused(shape):
        return None
    split = faster_split(shape, own, plan.card, spared(plan.fixed, plan.card))
    if split is None:
        return None
    settings = {"train.batch_size": split.batch, "train.gradient_accumulation": split.accumulation}
    found = _solution_of(_plan(config.changed(settings), model, plan.card))
    return found if found.fits else None
