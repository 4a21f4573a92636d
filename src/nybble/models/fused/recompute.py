"""Blocks whose activations are made again in the backward pass, from the stream before them, kept on card or host."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nybble.memory.pinned import pinned, unpin
from nybble.models.fused.attention import Layout
from nybble.models.fused.block import Block, Rotation
from nybble.models.fused.matrix import held_weight
from nybble.models.fused.regions import Projected, add

Kept = tuple[Tensor, Tensor | None]


class Ticket(NamedTuple):
    """For what a HostStore keeps of one block."""

    passing: int  # number of the forward pass
    slot: int
    with_middle: bool
    shape: torch.Size
    dtype: torch.dtype


class HostStore:
    """Keeps streams in pinned host memory; copies run beside the blocks, on a stream of their own.

    For forward passes that each are followed by their backward pass. Addresses never change, so that a CUDA graph can
    hold the copies. The copies to the host have as long as the next block takes (6 ms of 8B at 8k tokens, of which
    both take 2.5), and those back begin one block ahead.
    """

    def __init__(self, num_blocks: int, device: torch.device) -> None:
        self.num_blocks = num_blocks
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pools: list[list[Tensor]] = []  # slots of bytes, larger from pool to pool; CUDA graphs know the addresses
        self.passing = 0
        self.tickets: list[Ticket] = []  # of the pass in progress
        self.leaving: tuple[Kept, torch.cuda.Event] | None = None
        self.coming: dict[int, tuple[Kept, torch.cuda.Event]] = {}

    def begin(self) -> None:
        """A forward pass begins: what was kept before is given up."""
        self.passing += 1
        self.leaving = None
        self.tickets.clear()
        self.coming.clear()

    def put(self, h: Tensor, middle: Tensor | None) -> Ticket:
        """Keep the stream before a block, and that within it, each (tokens, hidden)."""
        self._wait_for_leaving()
        ticket = Ticket(self.passing, len(self.tickets), middle is not None, h.shape, h.dtype)
        self.tickets.append(ticket)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for place, tensor in zip(self._places(ticket), (h, middle), strict=False):
                if tensor is not None:
                    place.copy_(tensor, non_blocking=True)
            # Held until copied; `record_stream` would keep the memory from being used again within a CUDA graph.
            self.leaving = (h, middle), self.stream.record_event()
        return ticket

    def get(self, ticket: Ticket) -> Kept:
        """What was put for `ticket`, on the device again."""
        if ticket.passing != self.passing:
            raise RuntimeError("another forward pass came before this backward pass: what it had offloaded is gone")
        self._wait_for_leaving()
        if ticket.slot not in self.coming:
            self._fetch(ticket)
        kept, event = self.coming.pop(ticket.slot)
        torch.cuda.current_stream().wait_event(event)
        if ticket.slot:
            self._fetch(self.tickets[ticket.slot - 1])
        return kept

    def _fetch(self, ticket: Ticket) -> None:
        places = self._places(ticket)
        tensors = [torch.empty_like(place, device=self.stream.device) for place in places]
        self.stream.wait_stream(torch.cuda.current_stream())  # whoever had this memory before is done with it
        with torch.cuda.stream(self.stream):
            for tensor, place in zip(tensors, places, strict=True):
                tensor.copy_(place, non_blocking=True)
            kept = tensors[0], tensors[1] if ticket.with_middle else None
            self.coming[ticket.slot] = kept, self.stream.record_event()

    def _wait_for_leaving(self) -> None:
        if self.leaving is not None:
            torch.cuda.current_stream().wait_event(self.leaving[1])
            self.leaving = None

    def _places(self, ticket: Ticket) -> list[Tensor]:
        """Where the one or two streams of a block lie in host memory."""
        nbytes = ticket.shape.numel() * ticket.dtype.itemsize
        slot = self._pool(2 * nbytes)[ticket.slot]
        starts = (0, nbytes) if ticket.with_middle else (0,)
        return [slot[start : start + nbytes].view(ticket.dtype).view(ticket.shape) for start in starts]

    def _pool(self, nbytes: int) -> list[Tensor]:
        """The smallest pool with slots of so many bytes; a new one is at least twice the largest."""
        for slots in self.pools:
            if slots[0].numel() >= nbytes:
                return slots
        size = max(nbytes, 2 * self.pools[-1][0].numel()) if self.pools else nbytes
        memory = pinned(self.num_blocks * size)
        weakref.finalize(self, unpin, memory)
        self.pools.append(list(torch.split(memory, size)))
        return self.pools[-1]


def recomputed(block: Block, store: HostStore | None, h: Tensor, rotation: Rotation, layout: Layout) -> Tensor:
    """The stream (tokens, hidden) behind `block` for the stream h before it, of which only h is kept.

    In the backward pass the block is made again but for what nobody reads then, its last product and sum. In `store`,
    the stream after attention is kept as well, which spares the product before it: where memory is the host's, it costs
    nothing. In 8B at 8k tokens the two products take 54 ms of 196.
    """
    output: Tensor = _recomputed(block, store, rotation, layout, h, *block.masters)
    return output


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        block: Block,
        store: HostStore | None,
        rotation: Rotation,
        layout: Layout,
        h: Tensor,
        *_masters: Tensor,
    ) -> Tensor:
        ctx.block, ctx.store, ctx.rotation, ctx.layout = block, store, rotation, layout
        middle, gate_up = block.first_half((None, Projected(h)), rotation, layout)
        if store is None:
            ctx.save_for_backward(h)
        else:
            ctx.ticket = store.put(h.detach(), middle if block.after_attention is None else None)
        return add(*block.second_half(middle, gate_up))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        block: Block = ctx.block
        h, middle = (*ctx.saved_tensors, None) if ctx.store is None else ctx.store.get(ctx.ticket)
        h = h.detach().requires_grad_(ctx.needs_input_grad[4])
        with held_weight(block.gate_up.matrix):
            with torch.enable_grad():
                half = block.first_half((None, Projected(h)), ctx.rotation, ctx.layout, known=middle)
                residual, delta = block.second_half(*half, replay=True)
            d_narrow, d_B = delta.backward(d_output)
            ends = [(residual, d_output), (delta.base, d_output)]
            if delta.narrow is not None and d_narrow is not None:
                ends.append((delta.narrow, d_narrow))
            ends = [(end, gradient) for end, gradient in ends if end.requires_grad]
            torch.autograd.backward([end for end, _ in ends], [gradient for _, gradient in ends])
        # What trains within the block got its gradients there, but for what its end reads.
        own = dict(zip(map(id, delta.masters), d_B, strict=True))
        return None, None, None, None, h.grad, *(own.get(id(master)) for master in block.masters)


_recomputed: Callable[..., Tensor] = _Recomputed.apply
