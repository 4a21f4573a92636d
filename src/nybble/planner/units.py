"""The parts into which a plan cuts a model's halves, as `nybble.models.fused.policy` does, and what each takes.

Legend: half = of a layer, numbered in the model's order, two a layer; a unit has one or more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby

from nybble.plan import LEAST_ON_HOST_BYTES, MemoryPlan
from nybble.planner.cards import DeviceSpec
from nybble.planner.halves import HalfTape, Kind, Saved
from nybble.planner.rows import by_rows_again, by_rows_backward, by_rows_forward
from nybble.planner.sizes import Sizes
from nybble.planner.tape import Passage, Segment, Tape

_NOTHING, _ALL = Saved(regions=False), Saved(regions=True)
_ALL_BUT_NORMED = Saved(regions=True, normed=False)


@dataclass(frozen=True)
class Unit:
    """Halves that are kept, or recomputed from one stream.

    how: as LayerPolicy has it; without gradients `evaluate` or `evaluate by rows`.
    """

    how: str
    halves: range

    @property
    def kept(self) -> bool:
        return self.how in ("keep", "keep_matmuls", "keep_on_host")

    @property
    def on_host(self) -> bool:
        """Whether what is kept is on the host."""
        return self.how == "keep_on_host"

    @property
    def offloaded(self) -> bool:
        return self.how == "offload"

    @property
    def trains(self) -> bool:
        return not self.how.startswith("evaluate")


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
    """What happens in one half of a unit, in order.

    forward; release: of what the next half was to read. leave, fetch: of what goes to the host, the stream or all that
    is kept. again: what is made again before the backward pass; release_again: of what of it the next half was to read.
    backward; end: when the backward pass of the unit is over.
    """

    forward: Segment
    release: Segment
    leave: Segment
    fetch: Segment
    again: Segment
    release_again: Segment
    backward: Segment
    end: Segment


@dataclass(frozen=True)
class Walk:
    """A micro-batch of `tokens` on its way through units. mlp_rows: as MemoryPlan has it, for halves not kept."""

    sizes: Sizes
    card: DeviceSpec
    tokens: int
    mlp_rows: int | None
    _known: dict[object, HalfSegments] = field(default_factory=dict, compare=False)

    def forward(self, units: list[Unit]) -> Iterator[Passage]:
        """To where all but the last half's output has been added to the stream."""
        leaving: Passage | None = None
        on_host_before: Unit | None = None
        unit_before: Passage | None = None  # what that has left, which a name holds until this one is done
        for unit in units:
            half_before: Passage | None = None
            for half in unit.halves:
                segments = self._segments(unit, half)
                yield half, segments.forward
                if half_before is not None:
                    yield half_before
                half_before = half, segments.release
                if unit.offloaded and half == unit.halves[0]:
                    if leaving is not None:  # the host waits for its copy
                        yield leaving
                    leaving = half, segments.leave
                if unit.on_host and on_host_before is not None:
                    number, segments_before = self._alike(on_host_before, half)
                    yield number, segments_before.leave
            on_host_before = unit if unit.on_host else on_host_before
            if unit_before is not None:
                yield unit_before
            unit_before = half_before

    def end_of_forward(self, units: list[Unit]) -> Passage:
        """Gives back what the last norm has read."""
        half = units[-1].halves[-1]
        return half, self._segments(units[-1], half).release

    def backward(self, units: list[Unit]) -> Iterator[Passage]:
        """From d of the half that would come next, to that of the first."""
        streams = [(unit.halves[0], self._segments(unit, unit.halves[0])) for unit in units if unit.offloaded]
        on_host = [unit for unit in units if unit.on_host]
        del streams[-1:], on_host[-1:]  # the last of each never left
        for unit in reversed(units):
            if unit.offloaded and streams:  # the next one is fetched ahead
                ahead, segments = streams.pop()
                yield ahead, segments.fetch
            halves = [(half, self._segments(unit, half)) for half in unit.halves]
            if unit.kept:
                ahead_of_all = on_host.pop() if unit.on_host and on_host else None
                for half, segments in reversed(halves):
                    if ahead_of_all is not None:
                        number, segments_ahead = self._alike(ahead_of_all, half)
                        yield number, segments_ahead.fetch
                    yield half, segments.backward
                    yield half, segments.end
            else:
                yield from _again(halves)
                yield from ((half, segments.backward) for half, segments in reversed(halves))
                yield from ((half, segments.end) for half, segments in reversed(halves))

    def host_bytes(self, units: Sequence[Unit]) -> int:
        """Of what is on the host between the passes, rounded as on the device."""
        on_host = [unit for unit in units if unit.on_host]
        stream = self.tokens * self.sizes.model.hidden * self.sizes.value
        return sum(unit.offloaded for unit in units) * stream - sum(
            self._segments(unit, half).leave.change for unit in on_host for half in unit.halves
        )

    def _alike(self, unit: Unit, half: int) -> tuple[int, HalfSegments]:
        """The half of `unit`, a layer's, that is what `half` is of another."""
        number = unit.halves[half % 2]
        return number, self._segments(unit, number)

    def _segments(self, unit: Unit, half: int) -> HalfSegments:
        key = unit.how, half % 2, half == 0, half == unit.halves[0], half == unit.halves[-1]
        if key not in self._known:
            kind: Kind = "mlp" if half % 2 else "attention"
            tapes = HalfTape(self.sizes, self.card, kind, self.tokens, first=half == 0)
            self._known[key] = self._kept(tapes, unit) if unit.kept else self._recomputed(tapes, unit, half)
        return self._known[key]

    def _kept(self, half: HalfTape, unit: Unit) -> HalfSegments:
        saved = _ALL if unit.how == "keep" else _ALL_BUT_NORMED
        tape, none = Tape(), Tape().cut()
        if half.first:
            tape.find("h", half.stream)
        half.forward(tape, saved)
        forward = tape.cut()
        tape.drop("normed_out" if half.sandwiched else "out")
        release = tape.cut()
        leave = fetch = none
        if unit.on_host:
            away = {name: size for name, size in tape.held.items() if size >= LEAST_ON_HOST_BYTES}
            tape.drop(*away)
            leave = tape.cut()
            for name, size in away.items():
                tape.take(name, size, "activations fetched")
            fetch = tape.cut()
        half.backward(tape, saved, frozen_before=half.first)
        backward = tape.cut()
        tape.find(">d", half.stream)
        tape.drop("h", "rstd", ">d")
        return HalfSegments(forward, release, leave, fetch, none, none, backward, tape.cut())

    def _recomputed(self, half: HalfTape, unit: Unit, number: int) -> HalfSegments:
        """Streams within a unit live until its end, as names there hold them; so does the gradient that came."""
        begins, ends = number == unit.halves[0] and unit.trains, number == unit.halves[-1]
        rows = self.mlp_rows if half.kind == "mlp" and unit.how != "evaluate" else None
        tape = Tape()
        if half.first:
            tape.find("h", half.stream)
        if rows:
            by_rows_forward(tape, half, rows)
        else:
            half.forward(tape, _NOTHING)
        forward = tape.cut()
        tape.drop("out", "normed_out", "narrow_out", *(() if begins else ("h", "rstd")))
        release = tape.cut()
        tape.drop(*(["h"] if begins and unit.offloaded else []))
        leave = tape.cut()
        if begins and unit.offloaded:
            tape.take("h", half.stream, "streams fetched")
        fetch = tape.cut()
        if rows:
            by_rows_again(tape, half, rows, known=begins, replay=ends)
            again = tape.cut()
            tape.drop(*(() if ends else ("out", "narrow_out", "normed_out")))
            release_again = tape.cut()
            by_rows_backward(tape, half, rows)
        else:
            held = ends and half.kind == "mlp"
            if held:
                half.held.add("into")
            saved = _ALL_BUT_NORMED if self.mlp_rows else _ALL
            half.forward(tape, saved, known=begins, replay=ends)
            again = tape.cut()
            tape.drop(*(() if ends else ("out", "normed_out")))
            release_again = tape.cut()
            half.backward(tape, saved, frozen_before=half.first, once=held)
        backward = tape.cut()
        if ends or not self.mlp_rows or half.kind == "mlp":  # else it took the place of another
            tape.find(">d", half.stream)
        tape.drop("h", "rstd", ">d")
        if rows and begins:  # its gradient took that place, and goes on to the unit before
            tape.take("d", half.stream, "activation gradients")
        return HalfSegments(forward, release, leave, fetch, again, release_again, backward, tape.cut())


def _again(halves: list[tuple[int, HalfSegments]]) -> Iterator[Passage]:
    for number, (half, segments) in enumerate(halves):
        yield half, segments.again
        if number > 0:
            before, segments_before = halves[number - 1]
            yield before, segments_before.release_again


@lru_cache(maxsize=64)
def walk_of(sizes: Sizes, card: DeviceSpec, tokens: int, mlp_rows: int | None) -> Walk:
    """The same for the same sizes: a search asks for many plans."""
    return Walk(sizes, card, tokens, mlp_rows)
