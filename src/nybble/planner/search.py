"""Bytes and seconds of many plans at once: what activations take is added to what all else does, by plain sums.

Fragments are left out; they are followed up for the plans that are chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from nybble.plan import MemoryPlan, Place
from nybble.planner.candidates import (
    Choices,
    Ends,
    Placement,
    Retention,
    counts_between,
    ends,
    kept_counts,
    moments_places,
    on_host_intervals,
    retentions,
)
from nybble.planner.cards import DeviceSpec
from nybble.planner.cost import beyond, workspaces
from nybble.planner.holdings import matrices, on_device
from nybble.planner.sizes import Sizes
from nybble.planner.speed import Clock, Passes
from nybble.planner.step import MicroBatch
from nybble.planner.stock import StockStep
from nybble.planner.tape import rounded

_SLOTS = MemoryPlan.stream_slots


@dataclass(frozen=True)
class Candidate:
    """A plan with its estimates. nbytes: of the device, without fragments; host_bytes: pinned."""

    retention: Retention
    placement: Placement
    nbytes: int
    host_bytes: int
    seconds: float

    def plan(self, num_layers: int) -> MemoryPlan:
        return self.placement.applied(self.retention.plan(num_layers))


@dataclass(frozen=True)
class _Activations:
    """What a retention costs: taken of the device by a micro-batch, by the head's place, and both passes' time."""

    retention: Retention
    taken: dict[Place, int]
    passes: Passes


@dataclass(frozen=True)
class Search:
    sizes: Sizes
    card: DeviceSpec
    fixed: Choices

    def candidates(self, room: int) -> Iterator[Candidate]:
        """Every retention on the grid with every placement, among them the fewest layers streamed that fit `room`."""
        for activations in self._grid:
            yield from self._placed(activations, room)

    def between(self, found: Candidate, room: int) -> Iterator[Candidate]:
        """Those that keep a few more layers than one on the grid, and fewer than the next."""
        model, run, kept = self.sizes.model, self.sizes.run, found.retention.kept
        for count in counts_between(model, run, self.fixed, kept):
            yield from self._placed(self._activations(replace(found.retention, kept=count)), room)

    def fits(self, one: Candidate, room: int) -> bool:
        return one.nbytes <= room and one.host_bytes <= self.card.host_bytes

    @cached_property
    def _grid(self) -> list[_Activations]:
        model, run = self.sizes.model, self.sizes.run
        counts = kept_counts(model, run, self.fixed)
        first, *others = retentions(model, run, self.fixed)
        found = [replace(first, kept=kept) for kept in counts]
        # Where all layers are kept, all retentions are one.
        found += [replace(other, kept=kept) for other in others for kept in counts if kept < model.num_layers]
        return [
            self._activations(replace(one, on_host=interval))
            for one in found
            for interval in on_host_intervals(model, run, self.fixed, one)
        ]

    def _activations(self, retention: Retention) -> _Activations:
        run, plan = self.sizes.run, retention.plan(self.sizes.model.num_layers)
        micro_batch = MicroBatch(self.sizes, self.card, plan, run.batch, run.seq_len)
        heads = {head for _, head in self._ends}
        if run.is_fused(self.sizes.model):
            taken = micro_batch.peaks(heads)
        else:
            taken = dict.fromkeys(heads, sum(StockStep(self.sizes, plan, run.tokens).training().values()))
        return _Activations(retention, taken, self._clock.passes(micro_batch))

    def _placed(self, activations: _Activations, room: int) -> Iterator[Candidate]:
        """With all else wherever it may lie."""
        layers = self.sizes.model.num_layers
        for embedding, head in self._ends:
            for moments in moments_places(self.fixed):
                placement = Placement(embedding, head, moments)
                if self.fixed.weights in ("streamed", "disk"):
                    yield self._estimated(activations, replace(placement, streamed=layers, away=self.fixed.weights))
                    continue
                resident = self._estimated(activations, placement)
                yield resident
                if self.fixed.weights == "auto":
                    short = resident.nbytes + self._slots(activations.retention, layers) - room
                    fewest = -(-short // self._layer)
                    for streamed in {layers, fewest} if 0 < fewest < layers else {layers}:
                        yield self._streamed(activations, replace(placement, streamed=streamed))

    def _streamed(self, activations: _Activations, placement: Placement) -> Candidate:
        """From the host, or where that has no room for it from disk."""
        one = self._estimated(activations, placement)
        if self.fixed.in_files and one.host_bytes > self.card.host_bytes:
            return self._estimated(activations, replace(placement, away="disk"))
        return one

    def _estimated(self, activations: _Activations, placement: Placement) -> Candidate:
        retention, streamed, from_disk = activations.retention, placement.streamed, placement.from_disk
        held = self._everything - self._ends_away(placement)
        held -= self._moments if placement.moments == "paged" else 0
        held += self._slots(retention, streamed) - streamed * self._layer
        outside = workspaces(self.card) + beyond(self.card, self.sizes, from_disk=from_disk)
        nbytes = held + outside + activations.taken[placement.head]
        weights_s = self._clock.weights_s(streamed, _SLOTS * retention.span, from_disk=from_disk)
        time = self._clock.step(activations.passes, weights_s, head=placement.head, moments=placement.moments)
        return Candidate(retention, placement, nbytes, self._host_bytes(activations, placement), time.seconds)

    def _slots(self, retention: Retention, streamed: int) -> int:
        return min(_SLOTS * retention.span, streamed) * self.sizes.layer_weights

    def _host_bytes(self, activations: _Activations, placement: Placement) -> int:
        layers = 2 * activations.retention.span if placement.from_disk else placement.streamed
        held = layers * self.sizes.layer_weights + self._ends_away(placement)
        return held + activations.passes.on_host_bytes + (self._moments if placement.moments == "paged" else 0)

    def _ends_away(self, placement: Placement) -> int:
        """Bytes of embedding and head that are not on the device."""
        away = (placement.embedding, placement.head).count("host")
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
