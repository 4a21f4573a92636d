"""Predictions made up for tests of what is said about them."""

from __future__ import annotations

from collections.abc import Mapping

from nybble.plan import LayerPolicy, MemoryPlan
from nybble.planner.prediction import Phase, Prediction, StepTime

GIB = 2**30

MIXED = MemoryPlan(
    (LayerPolicy("keep"),) * 20 + (LayerPolicy("recompute", "streamed"),) * 12, embedding="host", moments="paged"
)
STEP = {
    "weights": 5.31,
    "activations": 12.4,
    "loss": 0.52,
    "context": 0.53,
    "adapters": 0.16,
    "moments": 0.31,
    "gradients": 0.16,
    "fragmentation": 0.44,
    "workspaces": 0.03,
    "rotations": 0.02,
}


def prediction(
    step: Mapping[str, float] = STEP, plan: MemoryPlan = MIXED, seconds: float = 2.0, host: float = 3.1
) -> Prediction:
    """step: GiB by category."""
    held = {name: int(gib * GIB) for name, gib in step.items()}
    phases = {
        "load": Phase({"weights": held["weights"], "workspaces": GIB // 4}),
        "step": Phase(held, {"streamed layers": int(host * GIB)}),
        "evaluation": Phase({"weights": held["weights"], "activations": 2 * GIB}),
        "save": Phase({"weights": held["weights"]}),
        "merge": Phase({"rows": GIB // 2}, {"rows": GIB}),
    }
    total = sum(held.values())
    time = StepTime(seconds, 0.9 * seconds, 0.4, "compute")
    return Prediction(plan, phases, total, total, time, 32768)
