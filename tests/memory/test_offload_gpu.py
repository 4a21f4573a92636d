"""Tensors in pinned host memory between the passes, on a card."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble.memory.offload import HostStore
from nybble.memory.transfer import SideStream

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")


def streams(seed: int) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return [torch.randn(300, 64, device=DEVICE, dtype=torch.bfloat16, generator=generator) for _ in range(3)]


def test_what_was_put_comes_back_while_memory_is_used_again() -> None:
    store = HostStore(3, SideStream(DEVICE))
    for seed in range(3):
        tensors = streams(seed)
        expected = [tensor.clone() for tensor in tensors]
        store.begin()
        tickets = []
        while tensors:
            tickets.append(store.put(tensors.pop(0)))
            torch.full((300, 64), torch.nan, device=DEVICE, dtype=torch.bfloat16)  # where the one before lay
        for ticket, tensor in zip(reversed(tickets), reversed(expected), strict=True):
            assert torch.equal(store.get(ticket), tensor)
    assert store.host_bytes == 3 * 300 * 64 * 2


def test_what_an_earlier_pass_put_is_gone() -> None:
    store = HostStore(1, SideStream(DEVICE))
    store.begin()
    ticket = store.put(streams(0)[0])
    store.begin()
    with pytest.raises(RuntimeError, match="another forward pass"):
        store.get(ticket)


def test_copies_are_recorded_in_a_graph() -> None:
    store = HostStore(3, SideStream(DEVICE))
    given, found = streams(0), streams(1)

    def step() -> None:
        store.begin()
        tickets = [store.put(tensor) for tensor in given]
        for ticket, place in zip(reversed(tickets), reversed(found), strict=True):
            place.copy_(store.get(ticket))

    step()  # host memory is locked
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed in (2, 3):
        expected = streams(seed)
        for place, tensor in zip(given, expected, strict=True):
            place.copy_(tensor)
        graph.replay()
        assert all(map(torch.equal, found, expected))
