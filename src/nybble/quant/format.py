"""How NF4 is laid out: the sizes that a reader of the bytes must know."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

from nybble.errors import UserError

BlockSize = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]  # what bitsandbytes reads
BLOCK_SIZES: tuple[int, ...] = get_args(BlockSize)


@dataclass(frozen=True)
class NF4Spec:
    """Values a block shares one absmax, and absmax values a group shares one second-level scale (0: absmax in fp32)."""

    block_size: int = 64
    group_size: int = 256

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise UserError(
                f"block size {self.block_size} is not supported",
                fix=f"Choose one of {', '.join(map(str, BLOCK_SIZES))}.",
            )
        if self.group_size < 0:
            raise UserError(f"group size {self.group_size} is negative", fix="0 turns double quantization off.")

    @classmethod
    def of(cls, block_size: int, *, double_quant: bool) -> NF4Spec:
        """By the settings of a model: with double quantization, groups are of the usual size."""
        return cls(block_size, cls.group_size if double_quant else 0)

    @property
    def double_quant(self) -> bool:
        return self.group_size > 0

    def num_blocks(self, numel: int) -> int:
        return -(-numel // self.block_size)

    def num_groups(self, numel: int) -> int:
        return -(-self.num_blocks(numel) // self.group_size) if self.double_quant else 0


def codes_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the packed bytes of a weight: a row of bytes a row of values when they fill it, else flat."""
    *rows, columns = shape
    return (*rows, columns // 2) if columns % 2 == 0 else ((prod(shape) + 1) // 2,)
