"""The ledger's phases add up to what was in use, each byte in one category."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nybble.memory.ledger import Ledger, PhaseMemory, Reading

CPU = torch.device("cpu")
MB = 10**6


class Device:
    """A device whose memory the test moves."""

    def __init__(self) -> None:
        self.allocated, self.peak, self.reserved, self.beyond = 0, 0, 0, 500 * MB

    def take(self, nbytes: int) -> None:
        self.allocated += nbytes
        self.peak = max(self.peak, self.allocated)
        self.reserved = max(self.reserved, self.peak)

    def read(self) -> Reading:
        reading = Reading(self.allocated, self.peak, self.reserved, self.beyond)
        self.peak = self.allocated
        return reading


@pytest.fixture
def device() -> Device:
    return Device()


def held(phase: PhaseMemory) -> dict[str, float]:
    return {name: nbytes / MB for name, nbytes in phase.held.items() if nbytes}


def weights_of(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


def test_categories_add_up(device: Device) -> None:
    weights, moments = weights_of(100 * MB), weights_of(20 * MB)
    ledger = Ledger(lambda: {"weights": [weights], "moments": [moments]}, CPU, read=device.read)
    device.take(130 * MB)  # and 10 that nobody names
    ledger.begin()
    device.take(5 * MB)
    device.take(50 * MB)
    device.take(-50 * MB)
    ledger.mark("one, forward")
    device.take(-5 * MB)
    ledger.mark("one, backward")
    constant = {"weights": 100, "moments": 20, "other": 10, "context": 500}
    forward, backward = ledger.phases
    assert held(forward) == constant | {"activations": 5, "temporary": 50}
    assert forward.total == 185 * MB + 500 * MB
    assert held(backward) == constant | {"activations": 5, "cached": 50}
    assert backward.total == forward.total  # the allocator has given nothing back


def test_a_storage_counts_once_and_where_it_is() -> None:
    memory = weights_of(64)
    ledger = Ledger(
        lambda: {
            "slots": [memory],
            "weights": [memory[:16], memory[32:], torch.empty(10, device="meta"), torch.empty(8)],
        },
        CPU,
        read=lambda: Reading(96, 96, 96, 0),
    )
    ledger.begin()
    ledger.mark("end")
    assert dict(ledger.phases[0].held) | {"slots": 64, "weights": 32} == dict(ledger.phases[0].held)
    assert ledger.phases[0].total == 96


def test_a_step_that_is_done_again_begins_again(device: Device) -> None:
    ledger = Ledger(dict, CPU, read=device.read)
    ledger.begin()
    ledger.border("layer 1", torch.ones(2, requires_grad=True))
    ledger.begin()
    ledger.border("layer 1", torch.ones(2, requires_grad=True))
    assert [phase.name for phase in ledger.phases] == ["layer 1, forward"]


@pytest.mark.parametrize("recomputed", [False, True])
def test_backward_passes_are_told_apart(device: Device, recomputed: bool) -> None:
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    ledger = Ledger(dict, CPU, read=device.read)

    def through(number: int, h: Tensor) -> Tensor:
        h = layers[number](h).tanh()
        ledger.border(f"layer {number + 1}", h)
        return h

    ledger.begin()
    h = torch.randn(2, 4)
    for number in range(3):
        if recomputed:
            h = torch.utils.checkpoint.checkpoint(through, number, h, use_reentrant=False)
        else:
            h = through(number, h)
    loss = h.sum()
    ledger.border("loss", loss)
    loss.backward()
    ledger.mark("layer 1, backward")
    names = [phase.name for phase in ledger.phases]
    parts = ["layer 1", "layer 2", "layer 3", "loss"]
    assert names == [f"{part}, forward" for part in parts] + [f"{part}, backward" for part in reversed(parts)]


def test_memory_of_this_process_is_read_on_a_cpu() -> None:
    kept: list[Tensor] = []
    ledger = Ledger(lambda: {"weights": []}, CPU)
    ledger.begin()
    kept.append(torch.ones(64 * MB, dtype=torch.uint8))
    ledger.mark("one")
    assert ledger.phases[0].held["activations"] > 60 * MB
