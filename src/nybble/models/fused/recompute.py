"""Blocks whose activations are made again in the backward pass, from the stream before them, kept on card or host.

Written for one stream of work: blocks run forward in order, then backward in the opposite order.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nybble.models.fused.attention import Layout
from nybble.models.fused.block import Block, Rotation
from nybble.models.fused.matrix import held_weights
from nybble.models.fused.regions import Projected, add

Kept = tuple[Tensor, Tensor | None]


class CheckpointStore(Protocol):
    """Keeps the streams before blocks, and with `keeps_middle` within them, from the forward to the backward pass.

    Each is (tokens, hidden). Blocks are known by their numbers.
    """

    keeps_middle: bool

    def put(self, number: int, h: Tensor, middle: Tensor | None) -> None: ...

    def get(self, number: int) -> Kept: ...


def checkpoint_store(activations: str, num_blocks: int, device: torch.device) -> CheckpointStore | None:
    """The store for this way of holding activations; None where they are kept."""
    if activations == "keep":
        return None
    return HostStore(num_blocks, device) if activations == "offload" and device.type == "cuda" else DeviceStore()


class DeviceStore:
    """Keeps the streams where they are."""

    keeps_middle = False  # twice the memory for 2 % of a step's time

    def __init__(self) -> None:
        self.held: dict[int, Kept] = {}

    def put(self, number: int, h: Tensor, middle: Tensor | None) -> None:
        self.held[number] = h, middle

    def get(self, number: int) -> Kept:
        return self.held.pop(number)


class HostStore:
    """Keeps the streams in one pinned piece of host memory; copies run beside the blocks, on a stream of their own.

    Addresses never change, so that a CUDA graph can hold the copies. The copies to the host have as long as the next
    block takes (6 ms of 8B at 8k tokens, of which both take 2.5), and those back begin one block ahead.
    """

    keeps_middle = True

    def __init__(self, num_blocks: int, device: torch.device) -> None:
        self.num_blocks = num_blocks
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pools: dict[torch.Size, list[Tensor]] = {}  # slots by shape; kept, as CUDA graphs know their addresses
        self.slots: list[Tensor] = []  # of the pass in progress, each (2, tokens, hidden)
        self.with_middle: list[bool] = []
        self.leaving: tuple[Kept, torch.cuda.Event] | None = None
        self.coming: dict[int, tuple[Kept, torch.cuda.Event]] = {}

    def put(self, number: int, h: Tensor, middle: Tensor | None) -> None:
        if number == 0:
            self._begin(h)
        self._wait_for_leaving()
        self.with_middle.append(middle is not None)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.slots[number][0].copy_(h, non_blocking=True)
            if middle is not None:
                self.slots[number][1].copy_(middle, non_blocking=True)
            # Held until copied; `record_stream` would keep the memory from being used again within a CUDA graph.
            self.leaving = (h, middle), self.stream.record_event()
        if number == self.num_blocks - 1:
            self._wait_for_leaving()

    def get(self, number: int) -> Kept:
        if number not in self.coming:
            self._fetch(number)
        kept, event = self.coming.pop(number)
        torch.cuda.current_stream().wait_event(event)
        if number:
            self._fetch(number - 1)
        return kept

    def _fetch(self, number: int) -> None:
        sources = self.slots[number][: 2 if self.with_middle[number] else 1]
        h, *middle = (torch.empty_like(source, device=self.stream.device) for source in sources)
        self.stream.wait_stream(torch.cuda.current_stream())  # whoever had this memory before is done with it
        with torch.cuda.stream(self.stream):
            for target, source in zip((h, *middle), sources, strict=True):
                target.copy_(source, non_blocking=True)
            self.coming[number] = (h, middle[0] if middle else None), self.stream.record_event()

    def _wait_for_leaving(self) -> None:
        if self.leaving is not None:
            torch.cuda.current_stream().wait_event(self.leaving[1])
            self.leaving = None

    def _begin(self, h: Tensor) -> None:
        self.leaving = None  # of a pass that broke off
        self.coming.clear()
        self.with_middle.clear()
        if h.shape not in self.pools:
            nbytes = 2 * h.numel() * h.element_size()
            pool = pinned(self.num_blocks * nbytes)
            weakref.finalize(self, unpin, pool)
            self.pools[h.shape] = [part.view(h.dtype).view(2, *h.shape) for part in torch.split(pool, nbytes)]
        self.slots = self.pools[h.shape]


def pinned(nbytes: int) -> Tensor:
    """Page-locked host memory of exactly this size, uint8. PyTorch's own allocator takes the next power of two."""
    memory = torch.empty(nbytes, dtype=torch.uint8)
    code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), nbytes, 0)  # type: ignore[no-untyped-call]
    if int(code) != 0:
        raise MemoryError(f"{nbytes} bytes of host memory cannot be locked (CUDA error {int(code)})")
    return memory


def unpin(memory: Tensor) -> None:
    """Undo `pinned`: the memory can be freed."""
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call]


def recomputed(
    block: Block, store: CheckpointStore, number: int, h: Tensor, rotation: Rotation, layout: Layout
) -> Tensor:
    """The stream (tokens, hidden) behind `block` for the stream h before it, of which only what `store` keeps is kept.

    In the backward pass the block is made again but for what nobody reads then: its last product and sum, and where
    the stream after attention was kept, the product before that. In 8B at 8k tokens they take 54 ms of 196.
    """
    output: Tensor = _recomputed(block, store, number, rotation, layout, h, *block.masters)
    return output


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        block: Block,
        store: CheckpointStore,
        number: int,
        rotation: Rotation,
        layout: Layout,
        h: Tensor,
        *_masters: Tensor,
    ) -> Tensor:
        ctx.block, ctx.store, ctx.number, ctx.rotation, ctx.layout = block, store, number, rotation, layout
        middle, gate_up = block.first_half((None, Projected(h)), rotation, layout)
        keeps_middle = store.keeps_middle and block.after_attention is None
        store.put(number, h.detach(), middle if keeps_middle else None)
        return add(*block.second_half(middle, gate_up))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        h, middle = ctx.store.get(ctx.number)
        h.requires_grad_(ctx.needs_input_grad[5])
        block: Block = ctx.block
        with held_weights(block.gate_up.matrix):
            with torch.enable_grad():
                half = block.first_half((None, Projected(h)), ctx.rotation, ctx.layout, known=middle)
                residual, delta = block.second_half(*half, replay=True)
            d_narrow, d_B = delta.backward(d_output)
            ends = [(residual, d_output), (delta.base, d_output)]
            if delta.narrow is not None and d_narrow is not None:
                ends.append((delta.narrow, d_narrow))
            torch.autograd.backward([end for end, _ in ends], [gradient for _, gradient in ends])
        # What trains within the block got its gradients there, but for what its end reads.
        own = dict(zip(map(id, delta.masters), d_B, strict=True))
        return None, None, None, None, None, h.grad, *(own.get(id(master)) for master in block.masters)


_recomputed: Callable[..., Tensor] = _Recomputed.apply
