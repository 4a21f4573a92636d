"""Tensors with a home in host memory, which a device holds while it has room: explicit pages, no managed memory.

Those that are at home are worked on in buckets. A bucket is copied in, altered and copied out, and all three go on at
once for different ones: with copies of equal speed both ways, the work takes as long as one copy of everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.memory.budget import available_bytes
from nybble.memory.layout import carve, starts_of
from nybble.memory.pinned import pinned

# Copies of 16 MiB and more run at the link's full speed, and with three buffers none waits for another's work.
BUCKET_BYTES = 32 * 2**20
NUM_BUFFERS = 3

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Part:
    """Units `start` to `stop` of the tensors of one set, on the device."""

    index: int  # of the set
    start: int
    stop: int
    tensors: Tensors


class Pages:
    """Sets of flat tensors that lie together on `device`, or at home in one pinned buffer of exactly their size.

    sets: dictionaries of tensors on the meta device, which say what there is; from then on they hold the tensors where
    these lie, at home to begin with. units: of each set, the number of equal pieces that its tensors can be split into.
    moves: how often they have changed places; whoever keeps an address must see that it has not changed.
    """

    def __init__(
        self, sets: Sequence[Tensors], units: Sequence[int], device: torch.device, *, bucket_bytes: int
    ) -> None:
        self.sets = sets
        self.device = device
        self.resident = False
        self.moves = 0
        every = [tensor for tensors in sets for tensor in tensors.values()]
        self.nbytes = starts_of(every)[-1]
        memory = pinned(self.nbytes)
        views = iter(carve(memory, every))
        self._home: list[Tensors] = [dict(zip(tensors, views, strict=False)) for tensors in sets]
        self._point_to(self._home)
        self._parts = [
            Part(index, start, stop, _slices(home, start, stop, number))
            for index, (home, number) in enumerate(zip(self._home, units, strict=True))
            for start, stop in _buckets(home, number, bucket_bytes)
        ]
        self._whole = [(index, number) for index, number in enumerate(units) if number]
        streams = 2 if device.type == "cuda" else 0
        self._streams = [torch.cuda.Stream(device) for _ in range(streams)]  # type: ignore[no-untyped-call]

    def evict(self) -> bool:
        """Send everything home and free the device's memory; whether there was any."""
        if not self.resident:
            return False
        self.settle()  # work on it may be queued on another stream
        for tensors, home in zip(self.sets, self._home, strict=True):
            for name, place in home.items():
                place.copy_(tensors[name], non_blocking=True)
        self.settle()
        self._point_to(self._home)
        self.resident = False
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what one stream has freed no other stream is given
        return True

    def restore_if_room(self, headroom_bytes: int = 0) -> bool:
        """Bring everything to the device if that leaves `headroom_bytes`; whether it is there now."""
        if self.resident:
            return True
        if available_bytes(self.device) < self.nbytes + headroom_bytes:
            return False
        try:
            held = [{name: torch.empty_like(t, device=self.device) for name, t in home.items()} for home in self._home]
        except torch.OutOfMemoryError:  # the room is in pieces
            return False
        self.settle()  # copies home may be on their way
        for tensors, home in zip(held, self._home, strict=True):
            for name, tensor in tensors.items():
                tensor.copy_(home[name], non_blocking=True)
        self._point_to(held)
        self.resident = True
        return True

    def settle(self) -> None:
        """Wait until what is at home can be read and written by the host."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def parts(self) -> Iterator[Part]:
        """Everything, part by part; what is done to a part before the next is taken, on the current stream, is kept.

        All memory that is needed is allocated here, before the first is taken: running out of it leaves all as it was.
        """
        if self.resident:
            return (Part(index, 0, number, self.sets[index]) for index, number in self._whole)
        buffers = min(NUM_BUFFERS, len(self._parts))
        size = max((starts_of(part.tensors.values())[-1] for part in self._parts), default=0)
        staging = torch.empty(buffers, size, dtype=torch.uint8, device=self.device)
        return self._staged(staging) if self._streams else self._copied(staging)

    def _copied(self, staging: Tensor) -> Iterator[Part]:
        """As `_staged`, one after the other."""
        for part in self._parts:
            staged = _staged(part, staging[0])
            _copy(part.tensors, staged.tensors)
            yield staged
            _copy(staged.tensors, part.tensors)

    def _staged(self, staging: Tensor) -> Iterator[Part]:
        """Each part in turn in one of the buffers; copies run ahead and behind on streams of their own."""
        current = torch.cuda.current_stream(self.device)
        inward, outward = self._streams
        for stream in (inward, outward):
            stream.wait_stream(current)  # whoever had the buffers' memory before is done with it
        staged = [_staged(part, staging[number % len(staging)]) for number, part in enumerate(self._parts)]
        arrived: list[torch.cuda.Event] = []
        left: list[torch.cuda.Event] = []
        try:
            for number, there in enumerate(staged):
                while len(arrived) < min(number + len(staging), len(staged)):
                    with torch.cuda.stream(inward):
                        if len(arrived) >= len(staging):
                            inward.wait_event(left[len(arrived) - len(staging)])
                        _copy(self._parts[len(arrived)].tensors, staged[len(arrived)].tensors)
                        arrived.append(inward.record_event())
                current.wait_event(arrived[number])
                yield there
                outward.wait_stream(current)
                with torch.cuda.stream(outward):
                    _copy(there.tensors, self._parts[number].tensors)
                    left.append(outward.record_event())
        finally:
            # The buffers are the current stream's again, and a CUDA graph of all this ends where it began: it may wait
            # for a stream only if that has waited for it, so both did at once, however little is done then.
            current.wait_stream(inward)
            current.wait_stream(outward)

    def _point_to(self, places: Sequence[Tensors]) -> None:
        self.moves += 1
        for tensors, there in zip(self.sets, places, strict=True):
            tensors.update(there)


def _staged(part: Part, buffer: Tensor) -> Part:
    views = carve(buffer, part.tensors.values())
    return Part(part.index, part.start, part.stop, dict(zip(part.tensors, views, strict=True)))


def _copy(source: Tensors, target: Tensors) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name], non_blocking=True)


def _buckets(tensors: Tensors, units: int, bucket_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of units, as many in each as `bucket_bytes` hold."""
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    step = max(1, bucket_bytes * units // max(nbytes, 1))
    for start in range(0, units, step):
        yield start, min(start + step, units)


def _slices(tensors: Tensors, start: int, stop: int, units: int) -> Tensors:
    values = {name: tensor.numel() // units for name, tensor in tensors.items()}
    return {name: tensor[start * values[name] : stop * values[name]] for name, tensor in tensors.items()}
