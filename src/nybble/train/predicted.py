"""What was predicted of a run, used while it runs and held against what was measured."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from nybble.config import RunConfig
from nybble.memory.budget import peak
from nybble.planner.cost import predict
from nybble.planner.figures import plan_figures, solution_figures
from nybble.planner.words import significant
from nybble.train import out_of_memory
from nybble.train.loop import StepResult
from nybble.train.plan import RunPlan
from nybble.train.window import Shapes
from nybble.units import format_bytes

# Lengths are rounded up to multiples of it: a prediction takes 30 ms, and each length is predicted once.
_STRIDE = 128
# What is on the device between two steps as well.
_AT_REST = ("weights", "adapters", "adapter copies", "gradients", "moments", "streaming slots")
# A plan that is to need less than one that ran out of memory.
_SMALLER = 0.9
# Kernels are compiled in the first steps, and graphs recorded.
_WARM_UP_STEPS = 3


def window_bytes(plan: RunPlan) -> Callable[[Shapes], int] | None:
    """What of the device a window of some shapes will take while it is computed, if that can be told and matters."""
    shape, solution = plan.shape, plan.solution
    if shape is None or solution is None or plan.memory.moments == "resident":
        return None

    @cache
    def of_micro_batch(batch: int, seq_len: int) -> int:
        run = dataclasses.replace(solution.run, batch=batch, seq_len=seq_len, evaluation_len=0)
        prediction = predict(shape, run, plan.card, plan.memory)
        step = prediction.phases["step"].device
        return prediction.allocated_bytes - sum(step.get(category, 0) for category in _AT_REST)

    return lambda shapes: max(of_micro_batch(batch, -(-length // _STRIDE) * _STRIDE) for batch, length in shapes)


def suggestion(config: RunConfig, plan: RunPlan, device: torch.device) -> str:
    """What to do about a run that ran out of memory: the plan that would fit, and settings that need less."""
    best = []
    if plan.solution is not None:
        measured = peak(device).total_bytes or plan.solution.prediction.peak_bytes
        budget_bytes = int(_SMALLER * min(measured, plan.solution.budget_bytes))
        if smaller := plan.smaller(budget_bytes):
            fixed = config.memory.model_dump(exclude={"budget"}, exclude_defaults=True)
            alone = f" without {', '.join(f'memory.{name}' for name in fixed)}" if fixed else ""
            best.append(f"memory.budget={budget_bytes / 2**30:.1f}GiB{alone}: {smaller}")
    return out_of_memory.suggestion(config, best)


def figures(plan: RunPlan) -> dict[str, Any]:
    """The plan and what it is predicted to need, if that can be told, as JSON values."""
    predicted = solution_figures(plan.solution) if plan.solution is not None and plan.on_gpu else None
    return {"plan": plan_figures(plan.memory), "stock_modules": plan.stock, "predicted": predicted}


def compared(plan: RunPlan, steps: Sequence[StepResult], device: torch.device) -> list[str]:
    """For printing: the prediction against the run; nothing where nothing was."""
    prediction, found = plan.prediction, peak(device).total_bytes
    if prediction is None:
        return []
    memory = f"peak {format_bytes(found)} of {format_bytes(prediction.peak_bytes)} predicted"
    parts = [f"{memory} ({found / prediction.peak_bytes - 1:+.1%})"]
    if speed := steady_speed(steps):
        expected = significant(prediction.tokens_per_second)
        parts.append(f"{significant(speed)} tokens/s of {expected} predicted")
    return ["measured: " + "; ".join(parts)]


def steady_speed(steps: Sequence[StepResult]) -> float | None:
    """Tokens a second in the median step, without the first ones."""
    speeds = [step.tokens / step.seconds for step in steps[_WARM_UP_STEPS:]]
    return statistics.median(speeds) if speeds else None
