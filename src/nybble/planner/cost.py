"""What a plan needs: the bytes of every phase of a run, and the time of a step."""

from __future__ import annotations

from nybble.plan import MemoryPlan
from nybble.planner.cards import DeviceSpec
from nybble.planner.prediction import Phase, Prediction, StepTime
from nybble.planner.run_shape import RunShape
from nybble.planner.shapes import ModelShape


def predict(model: ModelShape, run: RunShape, device: DeviceSpec, plan: MemoryPlan) -> Prediction:
    """What `run` needs under `plan`: device and host bytes of its phases, and the seconds of an optimizer step."""
    weights = model.parameters * run.storage_bytes
    phases = {name: Phase({"weights": weights}) for name in ("load", "step", "evaluation", "save", "merge")}
    seconds = 6 * model.parameters * run.tokens_a_step / device.bf16_flops
    return Prediction(plan, phases, weights, weights, StepTime(seconds, seconds, 0.0, "compute"), run.tokens_a_step)
