"""What lies in pinned host memory from the forward pass to the backward pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nybble.memory.pinned import pinned
from nybble.memory.transfer import Copy, SideStream


class Ticket(NamedTuple):
    """For a tensor that a HostStore keeps."""

    passing: int  # number of the forward pass
    slot: int
    shape: torch.Size
    dtype: torch.dtype


class HostStore:
    """Keeps tensors in pinned host memory; copies run beside what computes, on a stream of their own.

    For forward passes that each put at most `num_slots` tensors and are followed by their backward pass, which gets
    them in reverse. Addresses never change, so that a CUDA graph can hold the copies. The copies to the host have until
    the next tensor is put (a block takes 6 ms of 8B at 8k tokens, of which its stream takes 1.2), and those back begin
    one tensor ahead. The last one put has no need to come back.
    most_tokens: the most rows of a tensor, as far as that is known: memory is pinned for so many at once.
    """

    def __init__(self, num_slots: int, side: SideStream, most_tokens: int = 0) -> None:
        self.num_slots, self.most_tokens = num_slots, most_tokens
        self.side = side
        self.pools: list[list[Tensor]] = []  # slots of bytes, larger from pool to pool; CUDA graphs know the addresses
        self.passing = 0
        self.tickets: list[Ticket] = []  # of the pass in progress
        self.leaving: tuple[Ticket, Tensor, Copy] | None = None
        self.coming: dict[int, tuple[Tensor, Copy]] = {}

    def begin(self) -> None:
        """A forward pass begins: what was kept before is given up."""
        self.passing += 1
        self.leaving = None
        self.tickets.clear()
        self.coming.clear()

    def put(self, tensor: Tensor) -> Ticket:
        self._wait_for_leaving()
        ticket = Ticket(self.passing, len(self.tickets), tensor.shape, tensor.dtype)
        self.tickets.append(ticket)
        self.side.wait_for_current()
        # Held until copied; `record_stream` would keep the memory from being used again within a CUDA graph.
        self.leaving = ticket, tensor, self.side.copy(self._place(ticket), tensor)
        return ticket

    def get(self, ticket: Ticket) -> Tensor:
        """What was put for `ticket`, on the device again."""
        if ticket.passing != self.passing:
            raise RuntimeError("another forward pass came before this backward pass: what it had offloaded is gone")
        left = self._wait_for_leaving()
        if left is not None and left[0] == ticket:
            tensor = left[1]
        else:
            if ticket.slot not in self.coming:
                self._fetch(ticket)
            tensor, copy = self.coming.pop(ticket.slot)
            copy.join()
        if ticket.slot:
            self._fetch(self.tickets[ticket.slot - 1])
        return tensor

    @property
    def host_bytes(self) -> int:
        """Pinned so far."""
        return sum(len(slots) * slots[0].numel() for slots in self.pools)

    def _fetch(self, ticket: Ticket) -> None:
        place = self._place(ticket)
        tensor = torch.empty_like(place, device=self.side.device)
        self.side.wait_for_current()  # whoever had this memory before is done with it
        self.coming[ticket.slot] = tensor, self.side.copy(tensor, place)

    def _wait_for_leaving(self) -> tuple[Ticket, Tensor] | None:
        """What was put last, if it was still held until copied."""
        if self.leaving is None:
            return None
        (ticket, tensor, copy), self.leaving = self.leaving, None
        copy.join()
        return ticket, tensor

    def _place(self, ticket: Ticket) -> Tensor:
        row_bytes = ticket.shape[1:].numel() * ticket.dtype.itemsize
        nbytes = ticket.shape[0] * row_bytes
        pool = self._pool(nbytes, self.most_tokens * row_bytes)
        return pool[ticket.slot][:nbytes].view(ticket.dtype).view(ticket.shape)

    def _pool(self, nbytes: int, most_bytes: int) -> list[Tensor]:
        """The smallest pool with slots of so many bytes; the first has the most, others at least twice as many."""
        for slots in self.pools:
            if slots[0].numel() >= nbytes:
                return slots
        size = max(nbytes, 2 * self.pools[-1][0].numel() if self.pools else most_bytes)
        memory = pinned(self.num_slots * size)
        self.pools.append(list(torch.split(memory, size)))
        return self.pools[-1]
