"""What holds memory at every moment of a step: a ledger that is called where one part of the work ends.

A phase is what lies between two such calls: a layer's forward or backward pass, the loss, the update.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from nybble.memory.budget import beyond_bytes, take_peak

# What is in no inventory, from what lives longest to what is only kept. Activations: what phases leave for later ones.
# Other: there before the step began. Temporary: within a phase. Cached: kept by the allocator for later use, CUDA
# graphs too. Context: beyond the allocator, with libraries.
ACTIVATIONS, OTHER, TEMPORARY, CACHED, CONTEXT = "activations", "other", "temporary", "cached", "context"

_STATM = Path("/proc/self/statm")

# Tensors by category. A storage that several name belongs to the first; those elsewhere than on the device to none.
Inventory = Callable[[], Mapping[str, Iterable[Tensor]]]


class StepObserver(Protocol):
    """What the parts of a step call. They are called in vain at most times, so let them cost nothing then."""

    def begin(self) -> None:
        """A step begins; one that is done again begins again."""

    def border(self, part: str, tensor: Tensor) -> None:
        """The forward pass of `part` has ended with `tensor`, whose gradient is where its backward pass begins."""

    def mark(self, phase: str) -> None:
        """The phase of this name has ended."""


class Unobserved:
    """An observer of nothing."""

    def begin(self) -> None:
        pass

    def border(self, part: str, tensor: Tensor) -> None:
        pass

    def mark(self, phase: str) -> None:
        pass


@dataclass(frozen=True)
class Reading:
    """allocated: by tensors, now; peak and reserved: the most by tensors and the allocator since the reading before."""

    allocated: int
    peak: int
    reserved: int
    beyond: int


@dataclass(frozen=True)
class PhaseMemory:
    """The bytes of a phase by category, at its peak: together the most that the device had in use."""

    name: str
    held: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.held.values())


class Ledger:
    """Keeps the phases of one step on `device`. `read`: how the device's memory is read, if not as usual.

    Every phase has PyTorch count the peak of a GPU anew; `nybble.memory.budget.peak` is that of all phases.
    """

    def __init__(
        self, inventory: Inventory, device: torch.device, *, read: Callable[[], Reading] | None = None
    ) -> None:
        self.device = device
        self.phases: list[PhaseMemory] = []
        self._inventory = inventory
        self._read = read or (lambda: _read_gpu(device) if device.type == "cuda" else _read_process())
        self._parts: list[str] = []
        self._backward = False
        self._other = self._activations = 0

    def begin(self) -> None:
        self.phases.clear()
        self._parts.clear()
        self._backward = False
        self._activations = 0
        self._other = max(0, self._read().allocated - sum(self._held().values()))

    def border(self, part: str, tensor: Tensor) -> None:
        if self._backward:  # a layer that is recomputed
            return
        self.mark(f"{part}, forward")
        self._parts.append(part)
        number = len(self._parts)
        if tensor.requires_grad:
            tensor.register_hook(lambda _gradient: self._gradient_came(number))  # type: ignore[no-untyped-call]

    def mark(self, phase: str) -> None:
        self._backward = False
        reading, held = self._read(), self._held()
        before, self._activations = self._activations, reading.allocated - sum(held.values()) - self._other
        lasting = max(before, self._activations, 0)
        known = sum(held.values()) + self._other + lasting
        peak = max(reading.peak, known)
        rest = {OTHER: self._other, ACTIVATIONS: lasting, TEMPORARY: peak - known}
        rest |= {CACHED: max(0, reading.reserved - peak), CONTEXT: reading.beyond}
        self.phases.append(PhaseMemory(phase, held | rest))

    def _gradient_came(self, number: int) -> None:
        """The backward pass has come to the end of part `number`, counted from one: that of the next is done."""
        if number < len(self._parts):
            self.mark(f"{self._parts[number]}, backward")
        self._backward = True

    def _held(self) -> dict[str, int]:
        seen: set[int] = set()
        held: dict[str, int] = {}
        for category, tensors in self._inventory().items():
            storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == self.device.type]
            new = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in seen}
            seen.update(new)
            held[category] = sum(new.values())
        return held


def _read_gpu(device: torch.device) -> Reading:
    allocated, reserved = take_peak(device)
    return Reading(torch.cuda.memory_allocated(device), allocated, reserved, beyond_bytes(device))


def _read_process() -> Reading:
    """Anonymous memory of this process, Python and libraries with it, where the system tells; peaks are not known."""
    pages = [int(count) for count in _STATM.read_text().split()] if _STATM.exists() else [0, 0, 0]
    anonymous = (pages[1] - pages[2]) * mmap.PAGESIZE
    return Reading(anonymous, anonymous, anonymous, 0)
