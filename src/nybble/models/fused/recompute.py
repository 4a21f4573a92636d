"""Blocks whose activations are made again in the backward pass, from the block's input, which waits on card or host.

Written for one stream of work: blocks run forward in order, then backward in the opposite order.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class CheckpointStore(Protocol):
    """Keeps the inputs of blocks, each known by its number, from the forward pass to the backward pass."""

    def put(self, number: int, h: Tensor) -> None: ...

    def get(self, number: int) -> Tensor: ...


def checkpoint_store(activations: str, num_blocks: int, device: torch.device) -> CheckpointStore | None:
    """The store for this way of holding activations; None where they are kept."""
    if activations == "keep":
        return None
    return HostStore(num_blocks, device) if activations == "offload" and device.type == "cuda" else DeviceStore()


class DeviceStore:
    """Keeps the blocks' inputs where they are."""

    def __init__(self) -> None:
        self.held: dict[int, Tensor] = {}

    def put(self, number: int, h: Tensor) -> None:
        self.held[number] = h

    def get(self, number: int) -> Tensor:
        return self.held.pop(number)


class HostStore:
    """Keeps the blocks' inputs in one pinned piece of host memory; copies run beside the blocks, on their own stream.

    Addresses never change, so that a CUDA graph can hold the copies. A copy to the host has as long as the next block
    takes (17 ms of 8B at 8k tokens, of which the copy takes 1.3), and the copy back begins one block ahead.
    """

    def __init__(self, num_blocks: int, device: torch.device) -> None:
        self.num_blocks = num_blocks
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pools: dict[torch.Size, list[Tensor]] = {}  # slots by shape; kept, as CUDA graphs know their addresses
        self.slots: list[Tensor] = []  # of the pass in progress
        self.leaving: tuple[Tensor, torch.cuda.Event] | None = None
        self.coming: dict[int, tuple[Tensor, torch.cuda.Event]] = {}

    def put(self, number: int, h: Tensor) -> None:
        if number == 0:
            self._begin(h)
        self._wait_for_leaving()
        slot = self.slots[number]
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            slot.copy_(h, non_blocking=True)
            # Held until its copy is over; `record_stream` would keep it from being used again within a CUDA graph.
            self.leaving = h, self.stream.record_event()
        if number == self.num_blocks - 1:
            self._wait_for_leaving()

    def get(self, number: int) -> Tensor:
        if number not in self.coming:
            self._fetch(number)
        h, event = self.coming.pop(number)
        torch.cuda.current_stream().wait_event(event)
        if number:
            self._fetch(number - 1)
        return h

    def _fetch(self, number: int) -> None:
        h = torch.empty_like(self.slots[number], device=self.stream.device)
        self.stream.wait_stream(torch.cuda.current_stream())  # whoever had this memory before is done with it
        with torch.cuda.stream(self.stream):
            h.copy_(self.slots[number], non_blocking=True)
            self.coming[number] = h, self.stream.record_event()

    def _wait_for_leaving(self) -> None:
        if self.leaving is not None:
            torch.cuda.current_stream().wait_event(self.leaving[1])
            self.leaving = None

    def _begin(self, h: Tensor) -> None:
        self.leaving = None  # of a pass that broke off
        self.coming.clear()
        if h.shape not in self.pools:
            nbytes = h.numel() * h.element_size()
            pool = pinned(self.num_blocks * nbytes)
            weakref.finalize(self, unpin, pool)
            self.pools[h.shape] = [part.view(h.dtype).view(h.shape) for part in torch.split(pool, nbytes)]
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
    run: Callable[[Tensor], Tensor], store: CheckpointStore, number: int, h: Tensor, masters: Iterable[Tensor]
) -> Tensor:
    """run(h), of which only h is kept. `masters`: what `run` trains; they get their gradients from within."""
    output: Tensor = _recomputed(run, store, number, h, *masters)
    return output


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: Callable[[Tensor], Tensor], store: CheckpointStore, number: int, h: Tensor, *_masters: Tensor
    ) -> Tensor:
        ctx.run, ctx.store, ctx.number = run, store, number
        store.put(number, h.detach())
        return run(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        h = ctx.store.get(ctx.number).requires_grad_(ctx.needs_input_grad[3])
        with torch.enable_grad():
            output = ctx.run(h)
        torch.autograd.backward(output, d_output)
        return None, None, None, h.grad, *(None for _ in ctx.needs_input_grad[4:])


_recomputed: Callable[..., Tensor] = _Recomputed.apply
