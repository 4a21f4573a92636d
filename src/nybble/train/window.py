"""The micro-batches of one optimizer step as one tensor, which a single copy takes to the device.

Legend: values of int64; parts = one tensor of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from nybble.data.collate import Batch

# Values: each part begins at a multiple of 256 bytes, so that kernels can read it as they read a tensor of its own.
_ALIGNMENT = 32
_PARTS = 3  # input_ids, labels, position_ids

Shapes = tuple[torch.Size, ...]


@dataclass(frozen=True)
class Window:
    """shapes: (batch, seq_len) of each micro-batch. packed: (values,), two counts and then all parts."""

    shapes: Shapes
    packed: Tensor

    @classmethod
    def pack(cls, batches: Sequence[Batch], *, pinned: bool) -> Window:
        """Copy `batches` into one tensor of host memory; `pinned`, it is copied to a GPU without waiting."""
        shapes = tuple(batch.input_ids.shape for batch in batches)
        values = _ALIGNMENT + sum(_PARTS * _stride(shape) for shape in shapes)
        window = cls(shapes, torch.empty(values, dtype=torch.int64, pin_memory=pinned))
        window.counts[0] = sum(batch.target_tokens for batch in batches)
        window.counts[1] = sum(shape.numel() for shape in shapes)
        for batch, parts in zip(batches, window.inputs, strict=True):
            for part, value in zip(parts, (batch.input_ids, batch.labels, batch.position_ids), strict=True):
                part.copy_(value)
        return window

    def to(self, device: torch.device) -> Window:
        return Window(self.shapes, self.packed.to(device, non_blocking=True))

    def copy_(self, other: Window) -> None:
        """Take over the values of a window of the same shapes, without waiting if it is pinned."""
        self.packed.copy_(other.packed, non_blocking=True)

    @property
    def counts(self) -> Tensor:
        """Target tokens and all tokens, (2,)."""
        return self.packed[:2]

    @property
    def inputs(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """input_ids, labels and position_ids of each micro-batch, views of shape (batch, seq_len)."""
        start, inputs = _ALIGNMENT, []
        for shape in self.shapes:
            offsets = [start + index * _stride(shape) for index in range(_PARTS)]
            ids, labels, positions = (self.packed[at : at + shape.numel()].view(shape) for at in offsets)
            inputs.append((ids, labels, positions))
            start += _PARTS * _stride(shape)
        return inputs


def windows(micro_batches: Iterable[Batch], size: int, *, pinned: bool) -> Iterator[Window]:
    """`size` micro-batches at a time; the last window may have fewer."""
    stream = iter(micro_batches)
    while batches := list(islice(stream, size)):
        yield Window.pack(batches, pinned=pinned)


def _stride(shape: torch.Size) -> int:
    return -(-shape.numel() // _ALIGNMENT) * _ALIGNMENT
