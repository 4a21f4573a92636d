"""Heads that go through the device some rows at a time, wherever and however they lie.

Whole and in 16 bits the head of 8B is 1 GB, which is what keeping it in host memory or in NF4 is to spare.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from nybble.memory.host_matrix import HostLinear
from nybble.quant.linear import NF4Linear
from nybble.quant.weight import dequantize_stack_


class Chunks(Protocol):
    """A weight by chunks of its rows."""

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """All rows once: where each chunk begins, and the chunk, which holds until the next one is asked for."""


class PassingHead(Protocol):
    """A frozen head (out_features, in_features)."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def compute_dtype(self) -> torch.dtype: ...

    @property
    def bias(self) -> Tensor | None: ...

    @property
    def bytes_a_row(self) -> int:
        """Of the device, for each row of a chunk."""

    def passing(self, rows_a_chunk: int, *, passes: int = 1) -> contextlib.AbstractContextManager[Chunks]:
        """Its weight by chunks, for so many passes over all rows at most."""


def passing_head(head: nn.Module) -> PassingHead | None:
    """How `head` goes by chunks; None for one that is multiplied as it lies."""
    if isinstance(head, HostLinear):
        return head
    return NF4Head.of(head) if isinstance(head, NF4Linear) else None


@dataclass(frozen=True)
class NF4Head:
    """Each chunk is dequantized into the place of the one before."""

    linear: NF4Linear
    in_features: int
    out_features: int
    compute_dtype: torch.dtype
    bytes_a_row: int

    @classmethod
    def of(cls, linear: NF4Linear) -> NF4Head:
        dtype = linear.compute_dtype
        return cls(linear, linear.in_features, linear.out_features, dtype, linear.in_features * dtype.itemsize)

    @property
    def bias(self) -> nn.Parameter | None:
        return self.linear.bias

    @contextlib.contextmanager
    def passing(self, rows_a_chunk: int, *, passes: int = 1) -> Iterator[Chunks]:  # noqa: ARG002
        whole_blocks = rows_a_chunk * self.in_features % self.linear.spec.block_size == 0
        yield _NF4Chunks(self.linear, rows_a_chunk if whole_blocks else self.out_features)


@dataclass(frozen=True)
class _NF4Chunks:
    linear: NF4Linear
    rows_a_chunk: int

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        weight = self.linear.nf4_weight.single_level()
        shape = min(self.rows_a_chunk, self.linear.out_features), self.linear.in_features
        room = torch.empty(shape, dtype=self.linear.compute_dtype, device=weight.codes.device)
        for start in range(0, self.linear.out_features, self.rows_a_chunk):
            part = weight.rows(start, min(start + self.rows_a_chunk, self.linear.out_features))
            chunk = room[: part.shape[0]]
            dequantize_stack_(chunk, [part])
            yield start, chunk
