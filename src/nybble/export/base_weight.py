"""A weight to merge into or to quantize, read rows at a time: as it is stored, or as NF4 rounds it.

Legend: (out, in) = the shape of a linear's weight, also where the file has it as (in, out).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import gcd, prod

import torch
from torch import Tensor

from nybble.adapters.merge import row_blocks
from nybble.models.tensorfile import TensorBlocks, TensorEntry
from nybble.quant.weight import NF4Weight

WHOLE = slice(None)


@dataclass(frozen=True)
class StoredBase:
    """A weight in the dtype of its file. A transposed one, of GPT-2, is read whole: its rows are the file's columns."""

    entry: TensorEntry
    device: torch.device | str
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape[::-1] if self.transposed else self.entry.shape

    def row_blocks(self) -> Iterator[slice]:
        """Which rows to read at a time."""
        return iter([WHOLE]) if self.transposed or not self.shape else row_blocks(self.shape)

    def read(self, rows: slice) -> Tensor:
        if rows == WHOLE:
            weight = self.entry.read().to(self.device)
            return weight.t() if self.transposed else weight
        row_values = prod(self.shape[1:])
        part = self.entry.part(rows.start * row_values, rows.stop * row_values)
        return part.read().to(self.device).view(-1, *self.shape[1:])

    def streamed(self) -> Tensor | TensorBlocks:
        """The weight (out, in) row by row, to be taken once: in blocks of the file, or whole if it is transposed."""
        if self.transposed:
            return self.read(WHOLE).contiguous()
        blocks = (part.read().to(self.device) for part in self.entry.blocks())
        return TensorBlocks(self.shape, torch.device(self.device), blocks)


@dataclass(frozen=True)
class QuantizedBase:
    """A weight in NF4, of which rows are read in fp32."""

    weight: NF4Weight
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def row_blocks(self) -> Iterator[slice]:
        if self.transposed:
            return iter([WHOLE])
        block_size, row_values = self.weight.spec.block_size, prod(self.shape[1:])
        return row_blocks(self.shape, multiple_of=block_size // gcd(block_size, row_values))

    def read(self, rows: slice) -> Tensor:
        if rows == WHOLE:
            return self.weight.dequantize(torch.float32)
        return self._single_level.rows(rows.start, rows.stop).dequantize(torch.float32)

    @cached_property
    def _single_level(self) -> NF4Weight:
        return self.weight.single_level()
