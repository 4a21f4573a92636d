"""Tensors in pinned host memory between the passes."""

from __future__ import annotations

import pytest
import torch

from nybble.memory import offload
from nybble.memory.offload import HostStore
from nybble.memory.transfer import SideStream

CPU = SideStream(torch.device("cpu"))


def test_what_was_put_comes_back_as_it_was() -> None:
    store = HostStore(3, CPU)
    for length in (5, 9, 3):
        given = [torch.randn(length, 4, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
        expected = [tensor.clone() for tensor in given]
        store.begin()
        tickets = [store.put(tensor) for tensor in given]
        for tensor in given[:-1]:  # the last one did not have to leave
            tensor.zero_()
        for ticket, tensor in zip(reversed(tickets), reversed(expected), strict=True):
            found = store.get(ticket)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)


def test_what_an_earlier_pass_put_is_gone() -> None:
    store = HostStore(1, CPU)
    store.begin()
    ticket = store.put(torch.ones(3))
    store.begin()
    with pytest.raises(RuntimeError, match="another forward pass"):
        store.get(ticket)


def test_host_memory_is_locked_for_the_longest_rows_and_not_for_each_length(monkeypatch: pytest.MonkeyPatch) -> None:
    locked: list[int] = []
    monkeypatch.setattr(offload, "pinned", lambda n: (locked.append(n), torch.empty(n, dtype=torch.uint8))[1])
    store = HostStore(3, CPU)
    for nbytes in [100, 80, 101, 150, 200, 199, 201]:
        store.begin()
        for _ in range(3):
            store.put(torch.empty(nbytes, dtype=torch.uint8))
    assert locked == [300, 600, 1200]
    assert store.host_bytes == 2100
