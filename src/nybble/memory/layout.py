"""Tensors one behind another in one piece of memory, each aligned as the device's allocator would align it."""

from __future__ import annotations

from collections.abc import Collection
from itertools import accumulate

from torch import Tensor

_ALIGNMENT = 256  # bytes


def starts_of(tensors: Collection[Tensor]) -> list[int]:
    """The byte at which each begins, and last the one at which another would: the bytes of all."""
    return list(accumulate((-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors), initial=0))


def carve(memory: Tensor, like: Collection[Tensor]) -> list[Tensor]:
    """Views of `memory`, uint8 (bytes,), of the dtype and shape of each tensor."""
    return [
        memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(starts_of(like), like, strict=False)
    ]
