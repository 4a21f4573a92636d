"""From files to a GPU through a ring of pinned host buffers: threads fill some while the device copies from another.

Tensors lie one behind another in a stream of bytes, cut into windows as large as a buffer; window i goes through
buffer i modulo their number. So a large tensor takes several buffers, and small ones share one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, groupby

import torch
from torch import Tensor

from nybble.memory.pinned import pinned
from nybble.memory.transfer import Copy
from nybble.models.tensorfile import READERS, SEGMENT_BYTES, TensorEntry

# 256 MiB: pinning takes 0.25 s a GB.
_BUFFERS = 4
_BUFFER_BYTES = 64 * 2**20
_ALIGNMENT = 64  # of tensors in the stream


def read_onto(entries: Sequence[TensorEntry], device: torch.device) -> Generator[Tensor, None, None]:
    """The tensors of `entries` on `device`, in their order. The host holds one of them, or the buffers for a GPU.

    A GPU may still be copying the one that is yielded: what is to see it whole goes on the stream that is current here.
    """
    if device.type != "cuda":
        yield from (entry.read().to(device) for entry in entries)
        return
    size = min(_BUFFER_BYTES, sum(entry.nbytes for entry in entries))
    memory = pinned(_BUFFERS * size)
    try:
        with closing(StagingRing(list(memory.view(_BUFFERS, size)), device).read(entries)) as tensors:
            yield from tensors
    finally:
        torch.cuda.synchronize(device)  # the last copies read from `memory`


@dataclass(frozen=True)
class _Piece:
    """Bytes [offset, offset + length) of a tensor, which lie in their window from `position` on."""

    entry: TensorEntry
    offset: int
    length: int
    window: int
    position: int


class StagingRing:
    """Reads tensors onto a device through `buffers`, uint8 (bytes,) of one size."""

    def __init__(self, buffers: Sequence[Tensor], device: torch.device) -> None:
        self._buffers = buffers
        self._device = device

    def read(self, entries: Sequence[TensorEntry]) -> Generator[Tensor, None, None]:
        """The tensors in their order; raises UserError that names the file if one ends before its tensors do."""
        pieces = _cut(entries, self._buffers[0].numel())
        windows = [list(window) for _, window in groupby(chain(*pieces), key=lambda piece: piece.window)]
        with closing(self._staged(windows)) as staged:
            for entry, parts in zip(entries, pieces, strict=True):
                yield self._assemble(entry, parts, staged)  # held by no name here, so that its user can free it

    def _staged(self, windows: Sequence[Sequence[_Piece]]) -> Generator[Tensor, None, None]:
        """The bytes of each piece on the host; when the next is asked for, the copy of this one must be under way."""
        readers = ThreadPoolExecutor(READERS)
        try:
            ahead = zip(windows, self._buffers, strict=False)
            filling = deque(self._fill(readers, *pair, wait=lambda: None) for pair in ahead)
            for number, window in enumerate(windows):
                for segment in filling.popleft():
                    segment.result()
                buffer = self._buffers[number % len(self._buffers)]
                for piece in window:
                    yield buffer[piece.position : piece.position + piece.length]
                following = number + len(self._buffers)
                if following < len(windows):
                    filling.append(self._fill(readers, windows[following], buffer, wait=self._after_copies()))
        finally:
            readers.shutdown(cancel_futures=True)

    def _fill(
        self, readers: ThreadPoolExecutor, window: Sequence[_Piece], buffer: Tensor, *, wait: Callable[[], None]
    ) -> list[Future[None]]:
        """Begin to read `window` into `buffer` as soon as `wait` returns."""
        memory = buffer.numpy().data

        def read(piece: _Piece, start: int, stop: int) -> None:
            wait()
            piece.entry.read_into(memory[piece.position + start : piece.position + stop], piece.offset + start)

        return [
            readers.submit(read, piece, start, min(start + SEGMENT_BYTES, piece.length))
            for piece in window
            for start in range(0, piece.length, SEGMENT_BYTES)
        ]

    def _assemble(self, entry: TensorEntry, pieces: Sequence[_Piece], staged: Generator[Tensor, None, None]) -> Tensor:
        target = torch.empty(entry.nbytes, dtype=torch.uint8, device=self._device)
        for piece, source in zip(pieces, staged, strict=False):  # takes no more from `staged` than there are pieces
            self._copy(target[piece.offset : piece.offset + piece.length], source)
        return target.view(entry.dtype).reshape(entry.shape)

    def _copy(self, target: Tensor, source: Tensor) -> None:
        """Begin to copy, in the order of calls."""
        target.copy_(source, non_blocking=True)

    def _after_copies(self) -> Callable[[], None]:
        """What waits, in any thread, until all copies begun so far are done."""
        if self._device.type != "cuda":
            return lambda: None
        return Copy.last_on(torch.cuda.current_stream(self._device)).wait


def _cut(entries: Sequence[TensorEntry], window_bytes: int) -> list[list[_Piece]]:
    """The pieces of each tensor."""
    cut: list[list[_Piece]] = []
    position = 0
    for entry in entries:
        pieces: list[_Piece] = []
        offset = 0
        position = -(-position // _ALIGNMENT) * _ALIGNMENT
        while offset < entry.nbytes:
            window, start = divmod(position, window_bytes)
            length = min(entry.nbytes - offset, window_bytes - start)
            pieces.append(_Piece(entry, offset, length, window, start))
            offset += length
            position += length
        cut.append(pieces)
    return cut
