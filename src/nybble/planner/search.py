"""Bytes and seconds of many plans at once: what activations take is added to what all else does, by plain sums.

Fragments are left out; they are followed up for the plans that are chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from nybble.plan import MemoryPlan, Place
from nybble.planner.candidates import Choices, Ends, Pass, Rest, ends, kept_counts, moments, ways
from nybble.planner.cards import DeviceSpec
from nybble.planner.cost import beyond, workspaces
from nybble.planner.holdings import matrices, on_device
from nybble.planner.sizes import Sizes
from nybble.planner.speed import Clock, Passes
from nybble.planner.step import MicroBatch
from nybble.planner.stock import StockStep
from nybble.planner.tape import peak, rounded
from nybble.planner.units import units_of

_SLOTS = 2  # MemoryPlan.stream_slots


@dataclass(frozen=True)
class Tried:
    """A plan. nbytes: of the device, without fragments; host_bytes: pinned."""

    way: Pass
    rest: Rest
    nbytes: int
    host_bytes: int
    seconds: float

    def plan(self, num_layers: int) -> MemoryPlan:
        return self.rest.applied(self.way.plan(num_layers))


@dataclass(frozen=True)
class _Passing:
    """What a way takes of the device, by the head's place, and its time."""

    way: Pass
    taken: dict[Place, int]
    passes: Passes


@dataclass(frozen=True)
class Search:
    sizes: Sizes
    card: DeviceSpec
    fixed: Choices

    def tried(self, room: int) -> Iterator[Tried]:
        """All plans on the grid, and for each way the fewest layers streamed that make it fit in `room`."""
        for passing in self._grid:
            yield from self._around(passing, room)

    def closer(self, found: Tried, room: int) -> Iterator[Tried]:
        """Plans that keep a few more layers than one that was found."""
        more = [one.way.kept for one in self._grid if one.way.kept > found.way.kept]
        for kept in range(found.way.kept + 1, min(more, default=found.way.kept)):
            yield from self._around(self._passing(replace(found.way, kept=kept)), room)

    def fits(self, one: Tried, room: int) -> bool:
        return one.nbytes <= room and one.host_bytes <= self.card.host_bytes

    @cached_property
    def _grid(self) -> list[_Passing]:
        model, run = self.sizes.model, self.sizes.run
        counts = kept_counts(model, run, self.fixed)
        found = []
        for number, way in enumerate(ways(model, run, self.fixed)):
            for kept in counts:
                if kept < model.num_layers or number == 0:  # where all are kept, all ways are one
                    found.append(self._passing(replace(way, kept=kept)))
        return found

    def _passing(self, way: Pass) -> _Passing:
        plan = way.plan(self.sizes.model.num_layers)
        heads = {head for _, head in self._ends}
        taken = {head: self._taken(replace(plan, head=head)) for head in heads}
        units = units_of(self.sizes, plan)
        passes = self._clock.passes(units)
        return _Passing(way, taken, passes)

    def _taken(self, plan: MemoryPlan) -> int:
        run = self.sizes.run
        if run.is_fused(self.sizes.model):
            return peak(MicroBatch(self.sizes, self.card, plan, run.batch, run.seq_len).training())
        return sum(StockStep(self.sizes, plan, run.tokens).training().values())

    def _around(self, passing: _Passing, room: int) -> Iterator[Tried]:
        """With all that may be chosen beside a way."""
        layers = self.sizes.model.num_layers
        for embedding, head in self._ends:
            for moments_place in moments(self.fixed):
                rest = Rest(embedding, head, moments_place)
                if self.fixed.weights in ("streamed", "disk"):
                    yield from self._with(passing, replace(rest, streamed=layers, away=self.fixed.weights))
                    continue
                whole = self._one(passing, rest)
                yield whole
                if self.fixed.weights == "auto":
                    short = whole.nbytes + self._slots(passing, layers) - room
                    fewest = -(-short // self._layer)
                    for streamed in {layers, fewest} if 0 < fewest < layers else {layers}:
                        yield from self._with(passing, replace(rest, streamed=streamed))

    def _with(self, passing: _Passing, rest: Rest) -> Iterator[Tried]:
        """From the host, or where that has no room for it from disk."""
        one = self._one(passing, rest)
        if self.fixed.weights == "auto" and one.host_bytes > self.card.host_bytes:
            one = self._one(passing, replace(rest, away="disk"))
        yield one

    def _one(self, passing: _Passing, rest: Rest) -> Tried:
        held = self._everything - self._end_bytes((rest.embedding, rest.head))
        held -= self._moments if rest.moments == "paged" else 0
        if rest.streamed:
            held += self._slots(passing, rest.streamed) - rest.streamed * self._layer
        outside = workspaces(self.card) + beyond(self.card, self.sizes, from_disk=rest.away == "disk")
        nbytes = held + outside + passing.taken[rest.head]
        weights_s = self._clock.weights_s(rest.streamed, _SLOTS * passing.way.span, from_disk=rest.away == "disk")
        time = self._clock.of(passing.passes, weights_s, head=rest.head, moments=rest.moments)
        return Tried(passing.way, rest, nbytes, self._host_bytes(passing, rest), time.seconds)

    def _slots(self, passing: _Passing, streamed: int) -> int:
        return min(_SLOTS * passing.way.span, streamed) * self.sizes.layer_weights

    def _host_bytes(self, passing: _Passing, rest: Rest) -> int:
        layers = 2 * passing.way.span if rest.away == "disk" and rest.streamed else rest.streamed
        held = layers * self.sizes.layer_weights + self._end_bytes((rest.embedding, rest.head))
        return held + passing.passes.offloaded_bytes + (self._moments if rest.moments == "paged" else 0)

    def _end_bytes(self, places: Ends) -> int:
        """Of embedding and head that are not on the device."""
        away = places.count("host")
        return min(away, 1 if self.sizes.tied else 2) * self.sizes.vocabulary_matrix

    @cached_property
    def _clock(self) -> Clock:
        return Clock(self.sizes, self.card)

    @cached_property
    def _ends(self) -> list[Ends]:
        return ends(self.fixed, tied=self.sizes.tied)

    @cached_property
    def _everything(self) -> int:
        """All that a run holds, on the device."""
        plan = MemoryPlan.uniform(self.sizes.model.num_layers)
        return sum(rounded(size) for _, size in on_device(self.sizes, plan, moments_resident=True))

    @cached_property
    def _layer(self) -> int:
        return sum(map(rounded, matrices(self.sizes)))

    @cached_property
    def _moments(self) -> int:
        return sum(map(rounded, self.sizes.moments))
