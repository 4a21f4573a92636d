"""Tensors in pinned host memory between the passes."""

from __future__ import annotations

import pytest
import torch

from nybble.memory import offload
from nybble.memory.offload import HostStore


def test_host_memory_is_locked_for_the_longest_rows_and_not_for_each_length(monkeypatch: pytest.MonkeyPatch) -> None:
    locked: list[int] = []
    monkeypatch.setattr(offload, "pinned", lambda n: (locked.append(n), torch.empty(n))[1])
    store = HostStore.__new__(HostStore)
    store.num_slots, store.pools = 3, []
    for nbytes in [100, 80, 101, 150, 200, 199, 201]:
        assert store._pool(nbytes)[2].numel() >= nbytes
    assert locked == [300, 600, 1200]
    assert store.host_bytes == 2100
