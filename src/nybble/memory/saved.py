"""What autograd saves of layers for their backward passes, in pinned host memory between the two."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from nybble.memory.pinned import pinned
from nybble.memory.transfer import Copy, SideStream
from nybble.plan import LEAST_ON_HOST_BYTES


class SavedOnHost:
    """Keeps on the host what layers save, each within its `saving()`.

    What a layer saves n-th is held on the device until the next such layer has saved its n-th, and comes back from when
    the layer behind asks for what it saved: where only some layers do so, copies have the time of those between. The
    last layer's has no need to come back. Addresses never change, so that a CUDA graph can hold the copies.
    most_tokens: of a micro-batch; memory is pinned for so many at once, and grows if there are more.
    """

    def __init__(self, device: torch.device, most_tokens: int = 0) -> None:
        self.most_tokens = most_tokens
        self.side = SideStream(device)  # one for all, so that copies go in the order in which they are needed
        self.layers: list[_Layer] = []  # of the pass in progress
        self._memory: dict[tuple[int, int], list[Tensor]] = {}  # of a layer's n-th, larger from one to the next

    def begin(self) -> None:
        """A forward pass begins: what was kept before is given up."""
        for layer in self.layers:
            layer.give_up()
        self.layers.clear()

    def saving(self, tokens: int) -> saved_tensors_hooks:
        """Within, what a layer saves of so many tokens goes to the host, but for what is too small to be worth it."""
        before = self.layers[-1] if self.layers else None
        if before is not None and before.before is not None:
            before.before.let_go()
        layer = _Layer(self, len(self.layers), tokens, before)
        self.layers.append(layer)
        return saved_tensors_hooks(layer.pack, layer.unpack)

    def place(self, layer: int, number: int, nbytes: int, tokens: int) -> Tensor:
        """Pinned memory for what `layer` saves as `number`, uint8 (nbytes,)."""
        memories = self._memory.setdefault((layer, number), [])
        for memory in memories:
            if memory.numel() >= nbytes:
                return memory[:nbytes]
        memories.append(pinned(nbytes * max(tokens, self.most_tokens) // tokens))
        return memories[-1][:nbytes]

    @property
    def host_bytes(self) -> int:
        """Pinned so far."""
        return sum(memory.numel() for memories in self._memory.values() for memory in memories)


@dataclass
class _Away:
    """Memory that a layer saved, uint8 (bytes,).

    place: on the host; None for what stays on the device. uses: to come. held: where it was made, until it is copied.
    coming: on its way back. here: back, from its first use to its last.
    """

    place: Tensor | None = None
    uses: int = 0
    held: tuple[Tensor, Copy] | None = None
    coming: tuple[Tensor, Copy] | None = None
    here: Tensor | None = None

    def let_go(self) -> Tensor | None:
        """Where it was made, if it is held there still; from then on it is not."""
        if self.held is None:
            return None
        (memory, copy), self.held = self.held, None
        copy.join()
        return memory

    def give_up(self) -> None:
        self.held = self.coming = self.here = None


@dataclass
class _Layer:
    """What one layer saves in one pass. Memory that several nodes of the graph save goes and comes once.

    number: of the layer, among those that save so. before: the one before it.
    """

    home: SavedOnHost
    number: int
    tokens: int
    before: _Layer | None
    saved: list[_Away] = field(default_factory=list)  # small ones too, so that numbers are the same at every length
    given_up: bool = False
    _at: dict[int, _Away] = field(default_factory=dict)  # by address, which nothing else has as long as it is held
    _to_fetch: list[_Away] = field(default_factory=list)

    def pack(self, tensor: Tensor) -> Tensor | _View:
        storage = tensor.untyped_storage()
        away = self._at.get(storage.data_ptr())
        if away is None:
            away = self._at[storage.data_ptr()] = self._save(tensor)
        if away.place is None:
            return tensor.detach()  # a node that holds its own output is never freed
        away.uses += 1
        return _View(self, away, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())

    def unpack(self, packed: Tensor | _View) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed.tensor()

    def use(self, away: _Away) -> Tensor:
        """The memory of `away` on the device; the last use lets go of it."""
        if self.given_up:
            raise RuntimeError("another forward pass came before this backward pass: what was kept on the host is gone")
        if away.here is None:
            away.here = self._bring(away)
            if self.before is not None:
                self.before.fetch_next()
        away.uses -= 1
        memory, away.here = away.here, away.here if away.uses else None
        return memory

    def fetch_next(self) -> None:
        """Begin to bring back what was saved last of all that is away."""
        while self._to_fetch:
            away = self._to_fetch.pop()
            if away.held is None:
                assert away.place is not None
                memory = torch.empty_like(away.place, device=self.home.side.device)
                self.home.side.wait_for_current()  # whoever had this memory before is done with it
                away.coming = memory, self.home.side.copy(memory, away.place)
                return

    def let_go(self) -> None:
        """Hold nothing longer than until it is copied."""
        for away in self.saved:
            away.let_go()

    def give_up(self) -> None:
        self.given_up = True
        for away in self.saved:
            away.give_up()

    def _save(self, tensor: Tensor) -> _Away:
        number, away = len(self.saved), _Away()
        self.saved.append(away)
        if self.before is not None and number < len(self.before.saved):
            self.before.saved[number].let_go()
        memory = _bytes(tensor)
        if memory.numel() >= LEAST_ON_HOST_BYTES:
            away.place = self.home.place(self.number, number, memory.numel(), self.tokens)
            self.home.side.wait_for_current()
            # Held until copied; `record_stream` would keep the memory from being used again within a CUDA graph.
            away.held = memory, self.home.side.copy(away.place, memory)
            self._to_fetch.append(away)
        return away

    def _bring(self, away: _Away) -> Tensor:
        memory = away.let_go()
        if memory is not None:
            return memory
        while away.coming is None:
            self.fetch_next()
        (memory, copy), away.coming = away.coming, None
        copy.join()
        return memory


@dataclass(frozen=True)
class _View:
    """How a saved tensor lies in its memory."""

    layer: _Layer
    away: _Away
    dtype: torch.dtype
    offset: int | torch.SymInt
    shape: torch.Size
    stride: Any

    def tensor(self) -> Tensor:
        memory = self.layer.use(self.away).untyped_storage()
        return torch.empty(0, dtype=self.dtype, device=memory.device).set_(memory, self.offset, self.shape, self.stride)


def _bytes(tensor: Tensor) -> Tensor:
    """The memory that a tensor lies in, uint8 (bytes,)."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))
