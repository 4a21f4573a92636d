"""A matrix passes through a few slots in chunks: every chunk is right when it is there, ahead of time, and in turn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble.memory.passage import Passage, passing
from nybble.memory.transfer import Copy, SideStream

CPU = torch.device("cpu")


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("rows_a_chunk", [1, 4, 5, 20, 50])
def test_all_rows_pass_in_order(rows_a_chunk: int, passes: int, slots: int) -> None:
    matrix = torch.randn(20, 3)
    with passing(matrix, SideStream(CPU), rows_a_chunk, passes=passes, slots=slots) as passage:
        for _ in range(passes):
            found = [(first, chunk.clone()) for first, chunk in passage.chunks()]
            assert [first for first, _ in found] == list(range(0, 20, rows_a_chunk))
            assert torch.equal(torch.cat([chunk for _, chunk in found]), matrix)


class Recorded(SideStream):
    """Notes what is copied, and when it is waited for."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.events: list[str] = []

    def wait_for_current(self) -> None:
        self.events.append("wait")

    def copy(self, target: Tensor, source: Tensor) -> Copy:
        self.events.append(f"copy {int(source[0, 0])}")
        return super().copy(target, source)


def test_copies_begin_ahead_and_never_into_what_is_read() -> None:
    side = Recorded()
    passage = Passage(torch.arange(5.0)[:, None], side, 1, passes=2)
    assert side.events == ["wait", "copy 0", "wait", "copy 1"]
    for turn in range(2):
        for first, chunk in passage.chunks():
            begun = side.events[1::2]
            number = 5 * turn + first
            assert len(begun) == min(number + 2, 10)  # this one and the next
            assert chunk.item() == first
    assert side.events[1::2] == [f"copy {i % 5}" for i in range(10)]
    assert set(side.events[::2]) == {"wait"}  # each copy comes after what was launched before


def test_fewer_passes_than_announced() -> None:
    with passing(torch.randn(20, 3), SideStream(CPU), 8, passes=3) as passage:
        assert len(list(passage.chunks())) == 3
    assert not passage.slots


def test_no_passes() -> None:
    with passing(torch.randn(20, 3), SideStream(CPU), 8, passes=0) as passage:
        assert not passage.slots


def test_closed_after_an_error() -> None:
    with pytest.raises(MemoryError), passing(torch.randn(20, 3), SideStream(CPU), 8) as passage:
        raise MemoryError
    assert not passage.slots
