"""What a plan is predicted to need, as plain values that a report can show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nybble.plan import MemoryPlan


@dataclass(frozen=True)
class Phase:
    """One stretch of a run at its peak. device, host: bytes by category; host counts anonymous and pinned memory.

    The device's categories add up to all that the card shows in use, libraries and fragmentation included.
    """

    device: Mapping[str, int]
    host: Mapping[str, int] = field(default_factory=dict)

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


@dataclass(frozen=True)
class StepTime:
    """An optimizer step. compute: kernels alone; copies: the link's, most of which hides behind them."""

    seconds: float
    compute_s: float
    copies_s: float
    bound: str  # what the step waits for: "compute", "host-to-device link" or "kernel launches"


@dataclass(frozen=True)
class Prediction:
    """Of one plan. phases: load, step, evaluation, save, merge, whichever the run has."""

    plan: MemoryPlan
    phases: Mapping[str, Phase]
    allocated_bytes: int  # the most that tensors hold in a step: torch.cuda.max_memory_allocated
    reserved_bytes: int  # the most that the allocator holds: torch.cuda.max_memory_reserved
    time: StepTime
    tokens_a_step: int

    @property
    def peak_phase(self) -> str:
        """The phase of training (a merge is a process of its own) that needs the most of the device."""
        return max((name for name in self.phases if name != "merge"), key=lambda name: self.phases[name].device_bytes)

    @property
    def peak_bytes(self) -> int:
        """All that the card must have for the run."""
        return self.phases[self.peak_phase].device_bytes

    @property
    def host_bytes(self) -> int:
        """The most anonymous and pinned host memory in any phase of training."""
        return max(phase.host_bytes for name, phase in self.phases.items() if name != "merge")

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_a_step / self.time.seconds
