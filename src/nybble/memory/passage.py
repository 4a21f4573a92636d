"""A matrix in host memory on its way through the device, chunk by chunk, ahead of whoever multiplies with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor

from nybble.memory.transfer import Copy, SideStream


class Passage:
    """Chunks of rows of `matrix` (rows, columns) in page-locked host memory, copied to the device ahead of their use.

    The first copies begin at once, so that they run beside what is launched before the first chunk is asked for.
    passes: how often all rows will be asked for, at most. A CUDA graph can hold it from here to `close`: addresses are
    fixed, the host waits for nothing, and then nothing is under way.
    """

    def __init__(self, matrix: Tensor, side: SideStream, rows_a_chunk: int, *, passes: int = 1, slots: int = 2) -> None:
        self.matrix, self.side = matrix, side
        self.starts = range(0, len(matrix), rows_a_chunk)
        self.total = passes * len(self.starts)
        shape = min(rows_a_chunk, len(matrix)), matrix.shape[1]
        self.slots = [matrix.new_empty(shape, device=side.device) for _ in range(min(slots, self.total))]
        self.copies: list[Copy] = []  # of all chunks that were sent
        self.taken = 0
        for _ in self.slots:
            self._send()

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """All rows once: where each chunk begins, and the chunk, which holds until the next one is asked for."""
        for start in self.starts:
            self.copies[self.taken].join()
            yield start, self._part(self.taken)
            self.taken += 1
            if len(self.copies) < self.total:
                self._send()

    def close(self) -> None:
        """The memory of the slots may be used again."""
        if self.copies:
            self.copies[-1].join()  # and all before it
        self.slots.clear()

    def _send(self) -> None:
        """Begin the next copy, into the slot of the chunk that was done with last."""
        number = len(self.copies)
        part = self._part(number)
        start = self.starts[number % len(self.starts)]
        self.side.wait_for_current()
        self.copies.append(self.side.copy(part, self.matrix[start : start + len(part)]))

    def _part(self, number: int) -> Tensor:
        start = self.starts[number % len(self.starts)]
        return self.slots[number % len(self.slots)][: len(self.matrix) - start]


@contextlib.contextmanager
def passing(
    matrix: Tensor, side: SideStream, rows_a_chunk: int, *, passes: int = 1, slots: int = 2
) -> Iterator[Passage]:
    """A Passage that is closed at the end, however it comes."""
    passage = Passage(matrix, side, rows_a_chunk, passes=passes, slots=slots)
    try:
        yield passage
    finally:
        passage.close()
