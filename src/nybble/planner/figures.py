"""Predictions as JSON values."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from typing import Any

from nybble.plan import MemoryPlan
from nybble.planner.prediction import Prediction
from nybble.planner.solve import Solution


def plan_figures(plan: MemoryPlan) -> dict[str, Any]:
    """Its fields; neighbouring layers of one policy are one entry with their number."""
    policies = [(policy, len(list(run))) for policy, run in groupby(plan.layers)]
    return asdict(plan) | {"layers": [{"number": number, **asdict(policy)} for policy, number in policies]}


def prediction_figures(prediction: Prediction) -> dict[str, Any]:
    return {
        "plan": plan_figures(prediction.plan),
        "peak_bytes": prediction.peak_bytes,
        "peak_phase": prediction.peak_phase,
        "allocated_bytes": prediction.allocated_bytes,
        "reserved_bytes": prediction.reserved_bytes,
        "host_bytes": prediction.host_bytes,
        "step": asdict(prediction.time),
        "tokens_a_step": prediction.tokens_a_step,
        "tokens_per_second": prediction.tokens_per_second,
        "phases": {name: asdict(phase) for name, phase in prediction.phases.items()},
    }


def solution_figures(solution: Solution) -> dict[str, Any]:
    change = solution.change
    return {
        "fits": solution.fits,
        "budget_bytes": solution.budget_bytes,
        "host_bytes": solution.host_bytes,
        "prediction": prediction_figures(solution.prediction),
        "faster": prediction_figures(solution.faster) if solution.faster else None,
        "change": {"settings": change.settings, **prediction_figures(change.prediction)} if change else None,
    }
