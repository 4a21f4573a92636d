"""What a run takes from memory and gives back, in order: written down once for each kind of half, then replayed.

A half is of a layer, attention or MLP; they are numbered in the model's order. A name belongs to a half, unless it
begins with `@`: then there is one of it. `>` before a name means that it is the next half's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

Event = tuple[str, int, str]  # name, bytes (0: given back), category
Key = tuple[int, str]
Request = tuple[Key, int, str]

_ROUND = 512  # PyTorch's allocator gives multiples of it


@dataclass(frozen=True)
class Segment:
    """A stretch of events."""

    events: tuple[Event, ...]
    sizes: tuple[tuple[str, int], ...]  # of what it gives back and others had taken

    @cached_property
    def _running(self) -> list[int]:
        held = dict(self.sizes)
        changes = []
        for name, nbytes, _ in self.events:
            if nbytes:
                held[name] = nbytes
                changes.append(nbytes)
            else:
                changes.append(-held.pop(name))
        return list(accumulate(changes, initial=0))

    @cached_property
    def change(self) -> int:
        """Bytes taken and not given back."""
        return self._running[-1]

    @cached_property
    def rise(self) -> int:
        """The most bytes above what was held before."""
        return max(self._running)


class Tape:
    """Writes segments. Sizes are those that the allocator counts."""

    def __init__(self) -> None:
        self._prefix = ""
        self._events: list[Event] = []
        self._known: dict[str, int] = {}
        self._sizes: dict[str, int] = {}

    @contextmanager
    def within(self, prefix: str) -> Iterator[None]:
        """Names within are others than those without."""
        before, self._prefix = self._prefix, prefix
        yield
        self._prefix = before

    def take(self, name: str, nbytes: int, category: str) -> None:
        name = self._prefix + name
        assert name not in self._known, name
        self._known[name] = size = rounded(nbytes)
        self._events.append((name, size, category))

    def drop(self, *names: str) -> None:
        """Give back those of `names` that are held."""
        for name in (self._prefix + name for name in names):
            if self._known.pop(name, 0):
                self._events.append((name, 0, ""))

    @property
    def held(self) -> dict[str, int]:
        """Bytes, by name."""
        return dict(self._known)

    def has(self, name: str) -> bool:
        return self._prefix + name in self._known

    def find(self, name: str, nbytes: int) -> None:
        """What was taken elsewhere."""
        self._known[name] = self._sizes[name] = rounded(nbytes)

    @contextmanager
    def during(self, name: str, nbytes: int, category: str) -> Iterator[None]:
        """Held within, if it is anything."""
        if nbytes:
            self.take(name, nbytes, category)
        yield
        self.drop(name)

    def touch(self, name: str, nbytes: int, category: str) -> None:
        """Take and give back, if it is anything."""
        with self.during(name, nbytes, category):
            pass

    def cut(self) -> Segment:
        """What was written since the last cut, as a segment."""
        segment = Segment(tuple(self._events), tuple(self._sizes.items()))
        self._events, self._sizes = [], dict(self._known)
        return segment


def rounded(nbytes: int) -> int:
    return max(_ROUND, -(-nbytes // _ROUND) * _ROUND)


Passage = tuple[int, Segment]  # the half, and what happens in it


def replay(passages: Iterable[Passage]) -> Iterator[Request]:
    for half, segment in passages:
        for name, nbytes, category in segment.events:
            if name[0] == "@":
                yield (-1, name), nbytes, category
            elif name[0] == ">":
                yield (half + 1, name[1:]), nbytes, category
            else:
                yield (half, name), nbytes, category


@dataclass(frozen=True)
class Extent:
    """Of a stretch of passages: the most bytes above what was held before, and those that it leaves held."""

    rise: int = 0
    change: int = 0

    @classmethod
    def of(cls, passages: Iterable[Passage]) -> Extent:
        held = most = 0
        for _, segment in passages:
            if held + segment.rise > most:
                most = held + segment.rise
            held += segment.change
        return cls(most, held)

    def then(self, other: Extent) -> Extent:
        """Of this stretch and `other` behind it."""
        return Extent(max(self.rise, self.change + other.rise), self.change + other.change)


def peak(passages: Iterable[Passage]) -> int:
    """The most bytes held at any time."""
    return Extent.of(passages).rise


def at_peak(passages: Iterable[Passage]) -> dict[str, int]:
    """By category, what is held when most is."""
    passages = list(passages)
    limit, held = peak(passages), 0
    live: dict[Key, tuple[int, str]] = {}
    for key, nbytes, category in replay(passages):
        if nbytes:
            live[key] = nbytes, category
            held += nbytes
        else:
            held -= live.pop(key)[0]
        if held == limit:
            break
    totals: dict[str, int] = {}
    for nbytes, category in live.values():
        totals[category] = totals.get(category, 0) + nbytes
    return totals
