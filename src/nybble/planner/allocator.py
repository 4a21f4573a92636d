"""PyTorch's caching allocator, as arithmetic: what it reserves for a sequence of requests, fragments included.

The rules are those of c10/cuda/CUDACachingAllocator.cpp under `expandable_segments`: requests are rounded up to 512
bytes; up to 1 MiB they come from pages of 2 MiB; of larger ones the smallest free block that is large enough is taken,
what is left over is split off, and neighbours that are free are joined. Of small requests, half of all and a few MiB
together, only the sum is followed, as if they lay without gaps.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from nybble.planner.tape import Key, Request

MIB = 2**20
_SMALL, _SMALL_PAGE, _PAGE = MIB, 2 * MIB, 20 * MIB


@dataclass(eq=False, slots=True)
class _Block:
    address: int
    size: int
    before: _Block | None = None
    after: _Block | None = None
    free: bool = False


class Allocator:
    """One pool, as a stream or a CUDA graph has it. Bytes are counted as `torch.cuda.memory_stats` does.

    It is one segment, which grows at its end by pages of 20 MiB. The last block, which could grow, is taken only where
    no other is large enough. What is reserved stays so until it is given back, and then nothing more may be taken.
    """

    def __init__(self) -> None:
        self.reserved = self.allocated = self.most_allocated = 0
        self._free: list[tuple[int, int]] = []  # size and address
        self._at: dict[int, _Block] = {}  # free ones, by address
        self._held: dict[Key, _Block] = {}
        self._small: dict[Key, int] = {}
        self._small_bytes = self._small_reserved = 0
        self._end = 0
        self._last: _Block | None = None

    def run(self, events: Iterable[Request]) -> Allocator:
        for key, nbytes, _ in events:
            if nbytes:
                self.take(key, nbytes)
            else:
                self.drop(key)
        return self

    def take(self, key: Key, nbytes: int) -> None:
        if nbytes <= _SMALL:
            self._take_small(key, nbytes)
        else:
            block = self._find(bisect_left(self._free, (nbytes, 0)))
            if block is None:
                block = self._grow(nbytes)
            else:
                self._remove(block)
            if block.size > nbytes:
                self._split(block, nbytes)
            self._held[key] = block
            self.allocated += block.size
        if self.allocated > self.most_allocated:
            self.most_allocated = self.allocated

    def drop(self, key: Key) -> None:
        if small := self._small.pop(key, 0):
            self._small_bytes -= small
            self.allocated -= small
            return
        block = self._held.pop(key)
        self.allocated -= block.size
        if block.before is not None and block.before.free:
            self._remove(block.before)
            block = _join(block.before, block)
        if block.after is not None and block.after.free:
            self._remove(block.after)
            block = _join(block, block.after)
        self._add(block)

    def give_back(self) -> Allocator:
        """Give back every page that nothing lies on."""
        for size, address in self._free:
            self.reserved -= max(0, (address + size) // _PAGE - -(-address // _PAGE)) * _PAGE
        return self

    def _take_small(self, key: Key, nbytes: int) -> None:
        self._small[key] = nbytes
        self._small_bytes += nbytes
        self.allocated += nbytes
        if self._small_bytes > self._small_reserved:
            self._small_reserved += _SMALL_PAGE
            self.reserved += _SMALL_PAGE

    def _find(self, place: int) -> _Block | None:
        """Of the free blocks, by size, from `place` on the one to take."""
        found = None
        for _, address in islice(self._free, place, None):
            found = self._at[address]
            if found is not self._last:
                break
        return found

    def _grow(self, nbytes: int) -> _Block:
        """The end of the segment, grown to hold a request that found no block."""
        last, lacking = self._last, nbytes
        if last is not None and last.free:
            lacking -= last.size
        size = -(-lacking // _PAGE) * _PAGE
        grown = _Block(self._end, size, before=last)
        self.reserved += size
        self._end += size
        if last is not None:
            last.after = grown
            if last.free:
                self._remove(last)
                grown = _join(last, grown)
        self._last = grown
        return grown

    def _split(self, block: _Block, nbytes: int) -> None:
        rest = _Block(block.address + nbytes, block.size - nbytes, block, block.after)
        if block.after is not None:
            block.after.before = rest
        block.size, block.after = nbytes, rest
        self._add(rest)

    def _add(self, block: _Block) -> None:
        block.free = True
        if block.after is None:
            self._last = block
        insort(self._free, (block.size, block.address))
        self._at[block.address] = block

    def _remove(self, block: _Block) -> None:
        self._free.pop(bisect_left(self._free, (block.size, block.address)))
        del self._at[block.address]
        block.free = False


def _join(first: _Block, second: _Block) -> _Block:
    first.size += second.size
    first.after = second.after
    if second.after is not None:
        second.after.before = first
    return first
