"""Page-locked memory: what there is not is said as for all other memory, and a failure is nobody else's."""

from __future__ import annotations

import pytest
import torch

from nybble.memory.pinned import pinned


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 100_001])
def test_memory_has_the_size_asked_for(nbytes: int) -> None:
    memory = pinned(nbytes)
    assert (memory.dtype, memory.shape) == (torch.uint8, (nbytes,))
    memory.fill_(7)
    assert memory.sum() == 7 * nbytes
    assert memory.data_ptr() % 4096 == 0


def test_none_is_as_little() -> None:
    assert pinned(0).shape == (0,)


def test_more_than_the_host_has_is_out_of_memory() -> None:
    with pytest.raises(MemoryError, match="host memory"):
        pinned(2**60)


@pytest.mark.gpu
def test_it_is_locked_also_where_it_is_sliced() -> None:
    memory = pinned(100_001)
    assert memory.is_pinned()
    assert memory[50_000:].is_pinned()


@pytest.mark.gpu
def test_no_kernel_is_blamed_for_memory_that_cannot_be_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    locked = pinned(4096)
    monkeypatch.setattr(torch, "frombuffer", lambda *_, **__: locked)
    with pytest.raises(MemoryError, match="cannot be locked"):
        pinned(4096)
    assert torch.ones(5, device="cuda").sum() == 5
