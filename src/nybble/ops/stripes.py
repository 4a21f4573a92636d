"""How the gradients of low-rank pairs are shared out over a card; see `nybble.ops.triton.low_rank`.

Without torch: what the pieces of these gradients take is asked before anything is loaded, too.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Stripes:
    """How the columns are cut, and which programs share the tiles.

    rows, width: of a tile. bounds: where each part begins, counted in stripes, and where the last ends. pieces: the
    most programs that have tiles of one stripe.
    """

    rows: int
    width: int
    bounds: tuple[int, ...]
    programs: int
    tiles_per_program: int
    pieces: int

    @property
    def count(self) -> int:
        return self.bounds[-1]

    @classmethod
    @functools.lru_cache(maxsize=1024)  # a model has a few shapes, and asks again and again
    def of(
        cls, capability: tuple[int, int], multiprocessors: int, tokens: int, r: int, sizes: tuple[int, ...]
    ) -> Stripes:
        """On Hopper one program a multiprocessor, with three tiles of 64 KiB under way; elsewhere two of smaller tiles.

        Stripes are narrower where the widest would be more than a quarter empty, or give a program fewer than two
        tiles. sizes: columns of each part.
        """
        hopper = capability[0] == 9
        rows, width = (64, 512) if hopper else (32, 256)
        programs = multiprocessors if hopper else 2 * multiprocessors
        row_tiles = -(-tokens // rows)

        def stripes(width: int) -> list[int]:
            return [-(-size // width) for size in sizes]

        def suits(width: int) -> bool:
            count = sum(stripes(width))
            return 3 * width * count <= 4 * sum(sizes) and row_tiles * count >= 2 * programs

        width //= 1 if r <= 16 else 2  # d_B, width * r values in fp32, is in registers
        while width > 64 and not suits(width):
            width //= 2
        bounds = (0, *accumulate(stripes(width)))
        tiles = row_tiles * bounds[-1]
        share = -(-tiles // programs)
        pieces = max((start + row_tiles - 1) // share - start // share + 1 for start in range(0, tiles, row_tiles))
        return cls(rows, width, bounds, -(-tiles // share), share, pieces)


def largest_rank(capability: tuple[int, int]) -> int:
    """Up to which the kernels are the faster way: beyond, pieces of d_narrow are as much as a second read."""
    return 64 if capability >= (8, 0) else 16  # Triton has no matrix instructions for Turing
