"""The parts into which a plan cuts a model's halves, as `nybble.models.fused.policy` does, and what each takes.

Legend: half = of a layer, numbered in the model's order, two a layer; a unit has one or more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby

from nybble.plan import MemoryPlan
from nybble.planner.cards import DeviceSpec
from nybble.planner.halves import HalfTape, Saved
from nybble.planner.rows import by_rows_again, by_rows_backward, by_rows_forward
from nybble.planner.sizes import Sizes
from nybble.planner.tape import Passage, Segment, Tape

_NOTHING, _ALL = Saved(regions=False), Saved(regions=True)
_ALL_BUT_NORMED = Saved(regions=True, normed=False)


@dataclass(frozen=True)
class Unit:
    """Halves that are kept, or recomputed from one stream. how: as LayerPolicy has it; without gradients `pass` or
    `pass by rows`.
    """

    how: str
    halves: range

    @property
    def kept(self) -> bool:
        return self.how in ("keep", "keep_matmuls")

    @property
    def passes(self) -> bool:
        return self.how in ("pass", "pass by rows")


def units_of(sizes: Sizes, plan: MemoryPlan) -> list[Unit]:
    """Recomputed layers span multiples of `span`, with both halves of a layer apart where its middle is kept."""

    def key(layer: int) -> tuple[str, int]:
        how = plan.layers[layer].activations
        return how, layer // plan.span if how in ("recompute", "offload") else layer

    units: list[Unit] = []
    for (how, _), layers in groupby(range(sizes.model.num_layers), key=key):
        span = list(layers)
        halves = range(2 * span[0], 2 * span[-1] + 2)
        alone = how == "offload" and plan.keep_middle and plan.span == 1 and sizes.model.norms == 2
        units += [Unit(how, range(half, half + 1)) for half in halves] if alone else [Unit(how, halves)]
    return units


@dataclass(frozen=True)
class HalfSegments:
    """Stretches of one half. loose: gives back what the next half was to read. again: what a recomputation makes.

    leave, fetch: of the stream that is offloaded. read: gives back what of `again` only the next half wanted. end: when
    the backward pass of the unit is over.
    """

    forward: Segment
    loose: Segment
    leave: Segment
    fetch: Segment
    again: Segment
    read: Segment
    backward: Segment
    end: Segment


@dataclass(frozen=True)
class Passages:
    """A micro-batch of `tokens` through units. mlp_rows: as MemoryPlan has it, for halves that are not kept."""

    sizes: Sizes
    card: DeviceSpec
    tokens: int
    mlp_rows: int | None
    known: dict[object, HalfSegments] = field(default_factory=dict, compare=False)

    def forward(self, units: list[Unit]) -> Iterator[Passage]:
        """To where all but the last half's output has been added to the stream."""
        leaving: Passage | None = None
        before: Passage | None = None  # what the unit before has left, which a name holds until this one is done
        for unit in units:
            behind: Passage | None = None
            for half in unit.halves:
                segments = self.of(unit, half)
                yield half, segments.forward
                if behind is not None:
                    yield behind
                behind = half, segments.loose
                if unit.how == "offload" and half == unit.halves[0]:
                    if leaving is not None:  # the host waits for its copy
                        yield leaving
                    leaving = half, segments.leave
            if before is not None:
                yield before
            before = behind

    def end_of_forward(self, units: list[Unit]) -> Passage:
        """Gives back what the last norm has read."""
        half = units[-1].halves[-1]
        return half, self.of(units[-1], half).loose

    def backward(self, units: list[Unit]) -> Iterator[Passage]:
        """From d of the half that would come next, to that of the first."""
        offloaded = [unit for unit in units if unit.how == "offload"]
        if offloaded:
            last = offloaded[-1].halves[0]
            yield last, self.of(offloaded[-1], last).leave
            yield last, self.of(offloaded[-1], last).fetch
        for unit in reversed(units):
            if unit.how == "offload":
                offloaded.pop()
                if offloaded:  # the next one is fetched ahead
                    yield offloaded[-1].halves[0], self.of(offloaded[-1], offloaded[-1].halves[0]).fetch
            if not unit.kept:
                yield from self._again(unit)
            for half in reversed(unit.halves):
                yield half, self.of(unit, half).backward
                if unit.kept:
                    yield half, self.of(unit, half).end
            if not unit.kept:
                yield from ((half, self.of(unit, half).end) for half in reversed(unit.halves))

    def _again(self, unit: Unit) -> Iterator[Passage]:
        for half in unit.halves:
            yield half, self.of(unit, half).again
            if half != unit.halves[0]:
                yield half - 1, self.of(unit, half - 1).read

    def of(self, unit: Unit, half: int) -> HalfSegments:
        key = unit.how, half % 2, half == 0, half == unit.halves[0], half == unit.halves[-1]
        if key not in self.known:
            kind = "mlp" if half % 2 else "attention"
            tapes = HalfTape(self.sizes, self.card, kind, self.tokens, first=half == 0)  # type: ignore[arg-type]
            self.known[key] = self._kept(tapes, unit) if unit.kept else self._recomputed(tapes, unit, half)
        return self.known[key]

    def _kept(self, half: HalfTape, unit: Unit) -> HalfSegments:
        saved = _ALL if unit.how == "keep" else _ALL_BUT_NORMED
        tape, none = Tape(), Tape().cut()
        if half.first:
            tape.find("h", half.stream)
        half.forward(tape, saved)
        forward = tape.cut()
        tape.drop("normed_out" if half.sandwiched else "out")
        loose = tape.cut()
        half.backward(tape, saved, frozen_before=half.first)
        backward = tape.cut()
        tape.find(">d", half.stream)
        tape.drop("h", "rstd", ">d")
        return HalfSegments(forward, loose, none, none, none, none, backward, tape.cut())

    def _recomputed(self, half: HalfTape, unit: Unit, number: int) -> HalfSegments:
        """Streams within a unit live until its end, as names there hold them; so does the gradient that came."""
        begins, ends = number == unit.halves[0] and not unit.passes, number == unit.halves[-1]
        by_rows = bool(self.mlp_rows) and half.kind == "mlp" and unit.how != "pass"
        tape = Tape()
        if half.first:
            tape.find("h", half.stream)
        if by_rows and self.mlp_rows:
            by_rows_forward(tape, half, self.mlp_rows)
        else:
            half.forward(tape, _NOTHING)
        forward = tape.cut()
        tape.drop("out", "normed_out", "narrow_out", *(() if begins else ("h", "rstd")))
        loose = tape.cut()
        tape.drop(*(["h"] if begins and unit.how == "offload" else []))
        leave = tape.cut()
        if begins and unit.how == "offload":
            tape.take("h", half.stream, "streams fetched")
        fetch = tape.cut()
        if by_rows and self.mlp_rows:
            by_rows_again(tape, half, self.mlp_rows, known=begins, replay=ends)
            again = tape.cut()
            tape.drop(*(() if ends else ("out", "narrow_out", "normed_out")))
            read = tape.cut()
            by_rows_backward(tape, half, self.mlp_rows)
        else:
            held = ends and half.kind == "mlp"
            if held:
                half.held.add("into")
            saved = _ALL_BUT_NORMED if self.mlp_rows else _ALL
            half.forward(tape, saved, known=begins, replay=ends)
            again = tape.cut()
            tape.drop(*(() if ends else ("out", "normed_out")))
            read = tape.cut()
            half.backward(tape, saved, frozen_before=half.first, once=held)
        backward = tape.cut()
        if ends or not self.mlp_rows or half.kind == "mlp":  # else it took the place of another
            tape.find(">d", half.stream)
        tape.drop("h", "rstd", ">d")
        if by_rows and begins:  # its gradient took that place, and goes on to the unit before
            tape.take("d", half.stream, "activation gradients")
        return HalfSegments(forward, loose, leave, fetch, again, read, backward, tape.cut())


@lru_cache(maxsize=64)
def passages_of(sizes: Sizes, card: DeviceSpec, tokens: int, mlp_rows: int | None) -> Passages:
    """The same for the same sizes: a search asks for many plans."""
    return Passages(sizes, card, tokens, mlp_rows)
