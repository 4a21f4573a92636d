"""The fastest plan that fits: the fastest by estimate, as long as its prediction, fragments included, fits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

from nybble.plan import MemoryPlan
from nybble.planner.candidates import Choices
from nybble.planner.cards import DeviceSpec
from nybble.planner.cost import predict
from nybble.planner.prediction import Prediction
from nybble.planner.run_shape import RunShape
from nybble.planner.search import Candidate, Search
from nybble.planner.shapes import ModelShape
from nybble.planner.sizes import Sizes

# What fragments add to an estimate at least; more is left free in the next round, where it was.
_FRAGMENTS = 0.01
_ROUNDS = 4
# A plan is called faster if it is by so much: less is within what the clock errs.
_FASTER = 0.97
_AS_FAST = 1.003
_MOST_SPLITS = 4
_ENDLESS_BYTES = 2**60


@dataclass(frozen=True)
class Change:
    """A change of settings and what it leads to, in words for the user: `optim.state_bits=8`."""

    settings: str
    prediction: Prediction


@dataclass(frozen=True)
class Solution:
    """The fastest plan within `budget_bytes` of the device and `host_bytes` of the host.

    fits: whether it does; if not, `prediction` is of the leanest plan. leanest: the plan that needs the least. faster:
    the next faster plan, which needs more than the budget. change: of the settings of a run that does not fit, if any
    makes it.
    """

    run: RunShape
    prediction: Prediction
    budget_bytes: int
    host_bytes: int
    fits: bool
    leanest: MemoryPlan
    faster: Prediction | None = None
    change: Change | None = None

    @property
    def plan(self) -> MemoryPlan:
        return self.prediction.plan


def solve(model: ModelShape, run: RunShape, device: DeviceSpec, fixed: Choices | None = None) -> Solution:
    """The fastest plan for `run` on `device` that respects `fixed`."""
    solver = _Solver(model, run, device, fixed or Choices())
    found = solver.fastest()
    prediction = solver.leanest_prediction if found is None else found
    leanest, faster = solver.leanest.plan(model.num_layers), None if found is None else solver.next_faster(found)
    return Solution(run, prediction, solver.budget_bytes, device.host_bytes, found is not None, leanest, faster)


def faster_split(model: ModelShape, own: Solution, device: DeviceSpec, fixed: Choices) -> RunShape | None:
    """Another split of the optimizer step of `own` into micro-batches, which changes nothing of what is computed.

    The fastest by estimate, if it is faster than `own` by more than the clock errs, or fits where that does not.
    """
    best, best_s = None, _FASTER * own.prediction.time.seconds if own.fits else float("inf")
    for split in _splits(own.run):
        estimate = _Solver(model, split, device, fixed).estimate
        if estimate is not None and estimate.seconds < best_s:
            best, best_s = split, estimate.seconds
    return best


def _splits(run: RunShape) -> list[RunShape]:
    """Of the same sequences, those nearest to the run's own."""
    total = run.batch * run.accumulation
    others = [count for count in range(1, total + 1) if total % count == 0 and count != run.batch]
    nearest = sorted(others, key=lambda count: max(count / run.batch, run.batch / count))[:_MOST_SPLITS]
    return [dataclasses.replace(run, batch=count, accumulation=total // count) for count in nearest]


@dataclass(frozen=True)
class _Solver:
    model: ModelShape
    run: RunShape
    device: DeviceSpec
    fixed: Choices

    @cached_property
    def budget_bytes(self) -> int:
        given = self.fixed.budget_bytes
        return self.device.memory_bytes if given is None else min(given, self.device.memory_bytes)

    @cached_property
    def search(self) -> Search:
        """On a card with no more memory than the budget: moments are resident where they fit in that."""
        return Search(Sizes(self.model, self.run), self.device.with_memory(self.budget_bytes), self.fixed)

    def predict(self, one: Candidate) -> Prediction:
        return predict(self.model, self.run, self.search.card, one.plan(self.model.num_layers))

    def fastest(self) -> Prediction | None:
        room = self._room
        for _ in range(_ROUNDS):
            chosen = self._fastest_within(room)
            if chosen is None:
                break
            prediction = self.predict(chosen)
            if prediction.peak_bytes <= self.budget_bytes:
                return prediction
            room = min(chosen.nbytes - 1, room - (prediction.peak_bytes - self.budget_bytes))
        least = self.leanest_prediction
        fits = least.peak_bytes <= self.budget_bytes and least.host_bytes <= self.device.host_bytes
        return least if fits else None

    @property
    def estimate(self) -> Candidate | None:
        """The fastest, without its fragments."""
        return self._fastest_within(self._room)

    def next_faster(self, found: Prediction) -> Prediction | None:
        """Of those that are faster, and need more, the one that needs the least."""
        more = [one for one in self._all if one.nbytes > self._room]
        faster = [one for one in more if one.seconds < _FASTER * found.time.seconds]
        least = min(faster, key=lambda one: one.nbytes, default=None)
        if least is None:
            return None
        return predict(self.model, self.run, self.device.with_memory(_ENDLESS_BYTES), least.plan(self.model.num_layers))

    @cached_property
    def leanest(self) -> Candidate:
        on_host = [one for one in self._all if self.search.fits(one, _ENDLESS_BYTES)]
        return min(on_host or self._all, key=lambda one: (one.nbytes, one.seconds))

    @cached_property
    def leanest_prediction(self) -> Prediction:
        return self.predict(self.leanest)

    @cached_property
    def _all(self) -> list[Candidate]:
        return list(self.search.candidates(_ENDLESS_BYTES))

    @property
    def _room(self) -> int:
        return int(self.budget_bytes * (1 - _FRAGMENTS))

    def _fastest_within(self, room: int) -> Candidate | None:
        """Of those that are about as fast as the fastest the one that needs least of the host."""
        fitting = [one for one in self.search.candidates(room) if self.search.fits(one, room)]
        if not fitting:
            return None
        best = min(fitting, key=_seconds)
        plain = [one for one in fitting if not one.retention.keeps_on_host]
        if plain and best.seconds > _FASTER * min(map(_seconds, plain)):  # not worth the host's memory
            fitting, best = plain, min(plain, key=_seconds)
        fitting += [one for one in self.search.between(best, room) if self.search.fits(one, room)]
        least_s = min(map(_seconds, fitting))
        alike = [one for one in fitting if one.seconds <= _AS_FAST * least_s]
        return min(alike, key=lambda one: (one.host_bytes, one.seconds))


def _seconds(one: Candidate) -> float:
    return one.seconds
