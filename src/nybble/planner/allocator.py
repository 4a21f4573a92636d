"""PyTorch's caching allocator, as arithmetic: what it reserves for a sequence of requests, fragments included.

The rules are those of c10/cuda/CUDACachingAllocator.cpp: requests are rounded up to 512 bytes; up to 1 MiB they come
from segments of 2 MiB; of larger ones the smallest free block that is large enough is taken, and neighbours that are
free are joined. Of small requests, half of all and a few MiB together, only the sum is followed, as if they lay without
gaps.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from nybble.planner.tape import Key, Request

MIB = 2**20
_SMALL, _SMALL_SEGMENT, _MEDIUM, _MEDIUM_SEGMENT, _STEP = MIB, 2 * MIB, 10 * MIB, 20 * MIB, 2 * MIB
_PAGE = 20 * MIB


@dataclass(eq=False, slots=True)
class _Block:
    address: int
    size: int
    before: _Block | None = None
    after: _Block | None = None
    free: bool = False


class Allocator:
    """One pool, as a stream or a CUDA graph has it. Bytes are counted as `torch.cuda.memory_stats` does.

    Up to 10 MiB a request comes from a segment of 20 MiB, a larger one from a segment of its own in steps of 2 MiB;
    what is left over of a block is split off if it is over 1 MiB.
    What is reserved stays so: segments are given back only where memory runs out.
    """

    _kept_with_a_block = _SMALL

    def __init__(self) -> None:
        self.reserved = self.allocated = self.most_allocated = 0
        self._free: list[tuple[int, int]] = []  # size and address
        self._at: dict[int, _Block] = {}  # free ones, by address
        self._held: dict[Key, _Block] = {}
        self._small: dict[Key, int] = {}
        self._small_bytes = self._small_reserved = 0
        self._end = 0

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
                block = self._segment(nbytes)
            else:
                self._remove(block)
            if block.size - nbytes > self._kept_with_a_block:
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

    def _take_small(self, key: Key, nbytes: int) -> None:
        self._small[key] = nbytes
        self._small_bytes += nbytes
        self.allocated += nbytes
        if self._small_bytes > self._small_reserved:
            self._small_reserved += _SMALL_SEGMENT
            self.reserved += _SMALL_SEGMENT

    def _find(self, place: int) -> _Block | None:
        """Of the free blocks, by size, from `place` on the one to take."""
        return self._at[self._free[place][1]] if place < len(self._free) else None

    def _segment(self, nbytes: int) -> _Block:
        """A block that is not free for a request that found none."""
        size = _new_bytes(nbytes)
        self.reserved += size
        self._end += size
        return _Block(self._end - size, size)

    def _split(self, block: _Block, nbytes: int) -> None:
        rest = _Block(block.address + nbytes, block.size - nbytes, block, block.after)
        if block.after is not None:
            block.after.before = rest
        block.size, block.after = nbytes, rest
        self._add(rest)

    def _add(self, block: _Block) -> None:
        block.free = True
        insort(self._free, (block.size, block.address))
        self._at[block.address] = block

    def _remove(self, block: _Block) -> None:
        self._free.pop(bisect_left(self._free, (block.size, block.address)))
        del self._at[block.address]
        block.free = False


class ExpandableAllocator(Allocator):
    """One pool under `expandable_segments`: one segment, which grows at its end by pages of 20 MiB.

    Its last block, which could grow, is taken only where no other is large enough. What is left over is split off.
    """

    _kept_with_a_block = 0

    def __init__(self) -> None:
        super().__init__()
        self._last: _Block | None = None

    def _find(self, place: int) -> _Block | None:
        found = None
        for _, address in islice(self._free, place, None):
            found = self._at[address]
            if found is not self._last:
                break
        return found

    def _segment(self, nbytes: int) -> _Block:
        last, lacking = self._last, _new_bytes(nbytes)
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

    def _add(self, block: _Block) -> None:
        super()._add(block)
        if block.after is None:
            self._last = block


def _new_bytes(nbytes: int) -> int:
    """What is asked of the device for a request over 1 MiB."""
    return _MEDIUM_SEGMENT if nbytes < _MEDIUM else -(-nbytes // _STEP) * _STEP


def _join(first: _Block, second: _Block) -> _Block:
    first.size += second.size
    first.after = second.after
    if second.after is not None:
        second.after.before = first
    return first
