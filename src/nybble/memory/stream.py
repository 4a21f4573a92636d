"""Frozen weights of decoder layers that live in host memory and are on the device only around their use.

Legend: piece = what comes and goes together, a layer or several; position = of a piece, in the model's order;
slot = room on the device for one piece.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from nybble.memory.layout import carve, starts_of
from nybble.memory.pinned import pinned
from nybble.memory.transfer import Arrival, MappedReader, SideStream


class LayerStream:
    """Brings the parameters of each of `layers` to the device when it is their turn, a piece or more ahead.

    slots: pieces that the device holds. Position p goes to slot p modulo `slots`, so that what is still there from the
    forward pass is used first in the backward pass, which in turn leaves the first there for the next forward pass: a
    step ends as it began. span: layers a piece, [0, span) and so on, for those that are used in both orders in turn,
    as recomputing them together does.
    While a layer is away its parameters point to host memory, so that whoever reads them without `ready` fails.
    Parameters are taken over piece by piece, from wherever they lie: the host holds at most one piece twice. Those of
    `on_disk` stay mapped from their files instead, and are read ahead into two pinned buffers.
    """

    def __init__(
        self,
        layers: Mapping[int, Sequence[nn.Parameter]],
        device: torch.device,
        *,
        slots: int = 2,
        span: int = 1,
        on_disk: Collection[int] = (),
    ) -> None:
        if slots < 1:
            raise ValueError(f"a stream needs at least one slot, not {slots}")
        self.device = device
        together = [list(indices) for _, indices in groupby(sorted(layers), key=lambda index: index // span)]
        self._positions = {index: position for position, indices in enumerate(together) for index in indices}
        self._pieces = [_piece(layers, indices, on_disk) for indices in together]
        self.slots = _slots(self._pieces, min(slots, len(self._pieces)), device)
        for position, piece in enumerate(self._pieces):
            piece.settle_in(self.slots[position % len(self.slots)])
        self._held: list[int | None] = [None] * len(self.slots)  # the position in each slot, or on its way there
        self._arrivals: list[Arrival | None] = [None] * len(self.slots)  # of those on their way
        self._at: int | None = None  # the position that was used last
        self._side = SideStream(device)
        mapped_bytes = max((piece.nbytes for piece in self._pieces if piece.memory is None), default=None)
        self._reader = None if mapped_bytes is None else MappedReader(mapped_bytes, self._side)
        self._recording = False

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold the copies: reading files it cannot."""
        return self._reader is None

    @property
    def host_bytes(self) -> int:
        """Pinned host memory."""
        held = sum(piece.memory.nbytes for piece in self._pieces if piece.memory is not None)
        return held + (self._reader.nbytes if self._reader else 0)

    @property
    def device_bytes(self) -> int:
        return sum(slot.nbytes for slot in self.slots)

    @property
    def on_device(self) -> list[int]:
        """The layers that are on the device, or on their way there."""
        return [index for index, position in self._positions.items() if self._holds(position)]

    def ready(self, layer: int) -> None:
        """See that `layer` is on the device; to be called before each use, on the stream that uses it.

        Begins to copy those that come next, in the direction that the calls have.
        """
        position = self._positions[layer]
        self._notice_recording()
        if position == self._at:
            return
        step = self._direction(position)
        self._at = position
        window = (position + step * distance for distance in range(len(self.slots)))
        self._fetch([near for near in window if 0 <= near < len(self._pieces)])
        self._enter(position)

    def rewind(self) -> None:
        """Begin to bring the first layers back, after a pass that does not return to them by itself."""
        self._notice_recording()
        self._fetch(range(len(self.slots)))
        self._at = None

    def settle(self) -> None:
        """Be as a CUDA graph of a step must find it, and as it must leave it: at the first layers, all copies done."""
        self.rewind()
        for position in range(len(self.slots)):
            self._enter(position)

    def _direction(self, position: int) -> int:
        if position in (0, len(self._pieces) - 1):
            return -1 if position else 1  # here it turns, or a new pass begins
        return -1 if self._at is not None and position < self._at else 1

    def _holds(self, position: int) -> bool:
        return self._held[position % len(self.slots)] == position

    def _fetch(self, positions: Sequence[int]) -> None:
        """Begin to copy those that are not there, in this order; what is in their slots is of no more use."""
        missing = [position for position in positions if not self._holds(position)]
        if missing:
            self._side.wait_for_current()  # it may still read from those slots
        for position in missing:
            slot = position % len(self.slots)
            self._leave(slot)
            self._arrivals[slot] = self._copy(self._pieces[position], self.slots[slot])
            self._held[slot] = position

    def _copy(self, piece: _Piece, slot: Tensor) -> Arrival:
        if piece.memory is not None:
            return self._side.copy(slot[: piece.nbytes], piece.memory)
        assert self._reader is not None
        return self._reader.copy(slot[: piece.nbytes], piece.home, piece.starts)

    def _enter(self, position: int) -> None:
        """Let the parameters point into their slot, once they have arrived."""
        slot = position % len(self.slots)
        arrival = self._arrivals[slot]
        if arrival is not None:
            arrival.join()
            self._arrivals[slot] = None
            self._pieces[position].point_into_slot()

    def _leave(self, slot: int) -> None:
        """Empty the slot. What was on its way there arrives first, or it would arrive after what comes next."""
        held, self._held[slot] = self._held[slot], None
        if held is not None:
            self._enter(held)
            self._pieces[held].point_home()

    def _notice_recording(self) -> None:
        """After a CUDA graph was recorded, the slots hold what they held before it: what is recorded does not run.

        And they do so after each launch of the graph, as it is recorded from one `settle` to another.
        """
        recording = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if recording == self._recording:
            return
        first = range(len(self.slots))
        if recording and (any(self._arrivals) or not all(map(self._holds, first))):
            raise RuntimeError("the first layers are not on the device, or on their way, as a recording begins")
        self._recording = recording
        if not recording:
            self._at = None
            self._arrivals = [None for _ in first]
            for slot in first:
                self._leave(slot)
                self._held[slot] = slot
                self._pieces[slot].point_into_slot()


class _Piece:
    """The parameters that come and go together: where they lie at home and in the slot.

    memory: pinned, holds them one behind another; None if they stay where they are, mapped from files.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, on_disk: bool) -> None:
        if any(parameter.requires_grad for parameter in parameters):
            raise ValueError("only frozen parameters can be streamed")
        self.parameters = list({id(parameter): parameter for parameter in parameters}.values())
        *self.starts, self.nbytes = starts_of(self.parameters)
        self.memory = None if on_disk else pinned(self.nbytes)
        self.home = [parameter.detach() for parameter in self.parameters]
        self.in_slot: list[Tensor] = []
        if self.memory is not None:
            places = carve(self.memory, self.parameters)
            for place, parameter in zip(places, self.home, strict=True):
                place.copy_(parameter)
            self.home = places
            self.point_home()

    def settle_in(self, slot: Tensor) -> None:
        self.in_slot = carve(slot, self.parameters)

    def point_home(self) -> None:
        for parameter, place in zip(self.parameters, self.home, strict=True):
            parameter.data = place

    def point_into_slot(self) -> None:
        for parameter, place in zip(self.parameters, self.in_slot, strict=True):
            parameter.data = place


def _piece(layers: Mapping[int, Sequence[nn.Parameter]], indices: Sequence[int], on_disk: Collection[int]) -> _Piece:
    parameters = [parameter for index in indices for parameter in layers[index]]
    return _Piece(parameters, on_disk=any(index in on_disk for index in indices))


def _slots(pieces: Sequence[_Piece], count: int, device: torch.device) -> list[Tensor]:
    """Each as large as the largest piece that goes there."""
    sizes = [max(piece.nbytes for piece in pieces[slot::count]) for slot in range(count)]
    return [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
