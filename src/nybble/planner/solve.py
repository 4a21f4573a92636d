"""The fastest plan that fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nybble.plan import Activations, MemoryPlan, Place, Weights
from nybble.planner.cards import DeviceSpec
from nybble.planner.cost import predict
from nybble.planner.prediction import Prediction
from nybble.planner.run_shape import RunShape
from nybble.planner.shapes import ModelShape

Auto = Literal["auto"]


@dataclass(frozen=True)
class Choices:
    """What the user has fixed; the names are those of MemoryConfig, `auto` and 0 are the planner's to choose.

    budget_bytes: of the device, all counted; None: all that it has. micro_batches: whether the split of an optimizer
    step into micro-batches may be chosen too; it does not change what is computed.
    """

    activations: Activations | Auto = "auto"
    weights: Weights | Auto = "auto"
    embedding: Place | Auto = "auto"
    head: Place | Auto = "auto"
    moments: Literal["resident", "paged"] | Auto = "auto"
    span: int = 0
    mlp_rows: int = 0
    budget_bytes: int | None = None
    micro_batches: bool = False


@dataclass(frozen=True)
class Change:
    """A change of settings and what it leads to, in words for the user: `optim.state_bits: 8`."""

    settings: str
    prediction: Prediction


@dataclass(frozen=True)
class Solution:
    """The fastest plan within `budget_bytes`. run: as it will be split into micro-batches.

    fits: whether it does; if not, `prediction` is of the leanest plan, and `change` the smallest change of settings
    that would fit, if any would. faster: the next faster plan, which needs more than the budget.
    """

    run: RunShape
    prediction: Prediction
    budget_bytes: int
    fits: bool
    faster: Prediction | None = None
    change: Change | None = None

    @property
    def plan(self) -> MemoryPlan:
        return self.prediction.plan


def solve(model: ModelShape, run: RunShape, device: DeviceSpec, fixed: Choices | None = None) -> Solution:
    """The fastest plan for `run` on `device` that respects `fixed`."""
    fixed = fixed or Choices()
    budget_bytes = device.memory_bytes if fixed.budget_bytes is None else fixed.budget_bytes
    prediction = predict(model, run, device, MemoryPlan.uniform(model.num_layers))
    return Solution(run, prediction, budget_bytes, prediction.peak_bytes <= budget_bytes)


def micro_batches(
    model: ModelShape, run: RunShape, device: DeviceSpec, fixed: Choices | None = None
) -> tuple[RunShape, Solution]:
    """The split of the optimizer step of `run` into micro-batches that is fastest, and its solution."""
    return run, solve(model, run, device, fixed)
