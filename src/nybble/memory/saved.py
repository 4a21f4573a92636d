"""What autograd saves of layers for their backward passes, in pinned host memory between the two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from nybble.memory.offload import HostStore, Ticket
from nybble.memory.transfer import SideStream
from nybble.plan import LEAST_ON_HOST_BYTES


class SavedOnHost:
    """Keeps on the host what `num_layers` layers save, each within its `saving()`.

    They save tensors of one kind after the other, all in the same order, so the n-th of each has a store to itself.
    There it leaves until the next layer saves its n-th, and comes back from when the n-th of the layer behind is asked
    for: where only some layers do so, copies have the time of those between.
    """

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self.num_layers = num_layers
        self.side = SideStream(device)  # one for all, so that copies go in the order in which they are needed
        self.stores: list[HostStore] = []

    def begin(self) -> None:
        """A forward pass begins: what was kept before is given up."""
        for store in self.stores:
            store.begin()

    def saving(self) -> saved_tensors_hooks:
        """Within, what a layer saves goes to the host, but for what is too small to be worth a copy."""
        layer = _Layer(self)
        return saved_tensors_hooks(layer.pack, layer.unpack)

    def store(self, number: int) -> HostStore:
        if number == len(self.stores):
            self.stores.append(HostStore(self.num_layers, self.side))
            self.stores[-1].begin()
        return self.stores[number]

    @property
    def host_bytes(self) -> int:
        """Pinned so far."""
        return sum(store.host_bytes for store in self.stores)


class _Layer:
    """What one layer saves in one pass. Memory that several nodes of the graph save goes and comes once."""

    def __init__(self, home: SavedOnHost) -> None:
        self._home = home
        self._away: dict[int, _Away] = {}  # by address, which nothing else has while it is held until copied

    def pack(self, tensor: Tensor) -> Tensor | _View:
        storage = tensor.untyped_storage()
        if storage.nbytes() < LEAST_ON_HOST_BYTES:
            return tensor
        away = self._away.get(storage.data_ptr())
        if away is None:
            store = self._home.store(len(self._away))
            away = self._away[storage.data_ptr()] = _Away(store, store.put(_bytes(tensor)))
        away.uses += 1
        return _View(away, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())

    @staticmethod
    def unpack(packed: Tensor | _View) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed.tensor()


@dataclass
class _Away:
    """Memory that is not on the device but from its first use in the backward pass to its last."""

    store: HostStore
    ticket: Ticket
    uses: int = 0
    here: Tensor | None = None

    def use(self) -> Tensor:
        memory = self.store.get(self.ticket) if self.here is None else self.here
        self.uses -= 1
        self.here = memory if self.uses else None
        return memory


@dataclass(frozen=True)
class _View:
    """How a saved tensor lies in its memory."""

    away: _Away
    dtype: torch.dtype
    offset: int | torch.SymInt
    shape: torch.Size
    stride: Any

    def tensor(self) -> Tensor:
        memory = self.away.use().untyped_storage()
        return torch.empty(0, dtype=self.dtype, device=memory.device).set_(memory, self.offset, self.shape, self.stride)


def _bytes(tensor: Tensor) -> Tensor:
    """The memory that a tensor lies in, uint8 (bytes,)."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))
