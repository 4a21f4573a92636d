"""Copies between a device and pinned host memory or mapped files, beside what the device computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy
import numpy.typing
import torch
from torch import Tensor

from nybble.memory.pinned import pinned

# A mapped file comes in page by page, and its reader waits for each: several keep the disk busy.
_READERS = 8
_SEGMENT_BYTES = 8 * 2**20


class Arrival(Protocol):
    """Of what is being copied to the device."""

    def join(self) -> None:
        """Have the current stream wait for it."""


@dataclass(frozen=True)
class Copy:
    """A copy that was begun; without an event it is done."""

    device: torch.device
    event: torch.cuda.Event | None

    @classmethod
    def last_on(cls, stream: torch.cuda.Stream) -> Copy:
        """Of what was begun last on `stream`, and so of all before it."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # a host that waits sleeps
        event.record(stream)
        return cls(stream.device, event)

    def join(self) -> None:
        if self.event is not None:
            torch.cuda.current_stream(self.device).wait_event(self.event)

    def wait(self) -> None:
        """Have the host wait for it, in whatever thread this is."""
        if self.event is not None:
            with torch.cuda.device(self.device):  # a new thread is on GPU 0, and would take up memory there
                self.event.synchronize()


class SideStream:
    """Copies run here beside the current stream; on the CPU they are done at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.device = self._stream.device if self._stream is not None else device

    def wait_for_current(self) -> None:
        """Copies begun from now on come after all that was launched on the current stream."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def copy(self, target: Tensor, source: Tensor) -> Copy:
        """Begin to copy `source` to `target`: one is on the device, the other pinned."""
        if self._stream is None:
            target.copy_(source)
            return Copy(self.device, None)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return Copy.last_on(self._stream)


class MappedReader:
    """Brings mapped tensors to a device: a thread reads them into one pinned buffer while the other is copied from."""

    def __init__(self, most_bytes: int, side: SideStream) -> None:
        """most_bytes: the most that one call of `copy` brings."""
        self._side = side
        memory = pinned(2 * most_bytes)
        self.nbytes = memory.nbytes
        self._free = deque((buffer, Copy(side.device, None)) for buffer in torch.split(memory, most_bytes))
        self._copier = ThreadPoolExecutor(1)  # one after another, in the order of calls
        self._readers = ThreadPoolExecutor(_READERS)

    def copy(self, target: Tensor, sources: Sequence[Tensor], starts: Sequence[int]) -> Arrival:
        """Begin to copy `sources` to `target`, uint8 (bytes,) on the device, each to the byte where it starts."""
        return _MappedCopy(self._copier.submit(self._copy, target, sources, starts))

    def _copy(self, target: Tensor, sources: Sequence[Tensor], starts: Sequence[int]) -> Copy:
        buffer, last = self._free.popleft()
        last.wait()
        segments = [
            (begin + start, source[begin : begin + _SEGMENT_BYTES])
            for start, source in zip(starts, map(_bytes, sources), strict=True)
            for begin in range(0, len(source), _SEGMENT_BYTES)
        ]
        memory = buffer.numpy()

        def read(start: int, source: numpy.typing.NDArray[numpy.uint8]) -> None:
            memory[start : start + len(source)] = source  # numpy lets other threads run meanwhile

        for _ in self._readers.map(read, *zip(*segments, strict=True)):
            pass
        copy = self._side.copy(target, buffer[: len(target)])
        self._free.append((buffer, copy))
        return copy


@dataclass(frozen=True)
class _MappedCopy:
    begun: Future[Copy]

    def join(self) -> None:
        self.begun.result().join()


def _bytes(tensor: Tensor) -> numpy.typing.NDArray[numpy.uint8]:
    return tensor.reshape(-1).view(torch.uint8).numpy()
