"""The fastest plan that fits: the fastest by estimate, as long as its prediction, fragments included, fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nybble.plan import MemoryPlan
from nybble.planner.candidates import Choices
from nybble.planner.cards import DeviceSpec
from nybble.planner.cost import Costs
from nybble.planner.prediction import Prediction
from nybble.planner.run_shape import RunShape
from nybble.planner.search import Search, Tried
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

__all__ = ["Change", "Choices", "Solution", "micro_batches", "solve"]


@dataclass(frozen=True)
class Change:
    """A change of settings and what it leads to, in words for the user: `optim.state_bits=8`."""

    settings: str
    prediction: Prediction


@dataclass(frozen=True)
class Solution:
    """The fastest plan within `budget_bytes`. run: as it will be split into micro-batches.

    fits: whether it does; if not, `prediction` is of the leanest plan, and `change` the smallest change of settings
    that would fit, if any would. faster: the next faster plan, which needs more than the budget.
    """

    run: RunShape
    prediction: Prediction
    budget_bytes: int
    fits: bool
    faster: Prediction | None = None
    change: Change | None = None

    @property
    def plan(self) -> MemoryPlan:
        return self.prediction.plan


def solve(model: ModelShape, run: RunShape, device: DeviceSpec, fixed: Choices | None = None) -> Solution:
    """The fastest plan for `run` on `device` that respects `fixed`."""
    solver = _Solver(model, run, device, fixed or Choices())
    found = solver.fastest()
    if found is not None:
        return Solution(run, found, solver.budget_bytes, fits=True, faster=solver.next_faster(found))
    leanest = solver.predict(solver.leanest)
    return Solution(run, leanest, solver.budget_bytes, fits=False, change=_smallest_change(solver))


def micro_batches(
    model: ModelShape, run: RunShape, device: DeviceSpec, fixed: Choices | None = None
) -> tuple[RunShape, Solution]:
    """The split of the optimizer step of `run` into micro-batches that is fastest, and its solution.

    It changes nothing of what is computed. As the run has it, if no other is faster by more than the clock errs.
    """
    own = solve(model, run, device, fixed)
    best, best_s = run, _FASTER * own.prediction.time.seconds if own.fits else float("inf")
    for split in _splits(run):
        estimated = _Solver(model, split, device, fixed or Choices()).estimated()
        if estimated is not None and estimated.seconds < best_s:
            best, best_s = split, estimated.seconds
    return (run, own) if best is run else (best, solve(model, best, device, fixed))


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

    def predict(self, one: Tried) -> Prediction:
        return Costs(self.search.sizes, self.search.card, one.plan(self.model.num_layers)).prediction()

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
        prediction = self.predict(self.leanest)
        fits = prediction.peak_bytes <= self.budget_bytes and prediction.host_bytes <= self.device.host_bytes
        return prediction if fits else None

    def estimated(self) -> Tried | None:
        return self._fastest_within(self._room)

    def next_faster(self, found: Prediction) -> Prediction | None:
        """Of those that are faster, and need more, the one that needs the least."""
        tried = (one for one in self.search.tried(_ENDLESS_BYTES) if one.nbytes > self._room)
        faster = [one for one in tried if one.seconds < _FASTER * found.time.seconds]
        least = min(faster, key=lambda one: one.nbytes, default=None)
        if least is None:
            return None
        card = self.device.with_memory(_ENDLESS_BYTES)
        return Costs(self.search.sizes, card, least.plan(self.model.num_layers)).prediction()

    @property
    def leanest(self) -> Tried:
        tried = list(self.search.tried(_ENDLESS_BYTES))
        on_host = [one for one in tried if self.search.fits(one, _ENDLESS_BYTES)]
        return min(on_host or tried, key=lambda one: (one.nbytes, one.seconds))

    @property
    def _room(self) -> int:
        return int(self.budget_bytes * (1 - _FRAGMENTS))

    def _fastest_within(self, room: int) -> Tried | None:
        """Of those that are about as fast as the fastest the one that needs least of the host."""
        fitting = [one for one in self.search.tried(room) if self.search.fits(one, room)]
        if not fitting:
            return None
        best = min(fitting, key=_seconds)
        fitting += [one for one in self.search.closer(best, room) if self.search.fits(one, room)]
        least_s = min(map(_seconds, fitting))
        alike = [one for one in fitting if one.seconds <= _AS_FAST * least_s]
        return min(alike, key=lambda one: (one.host_bytes, one.seconds))


def _seconds(one: Tried) -> float:
    return one.seconds


def _smallest_change(solver: _Solver) -> Change | None:
    """The first of some changes, the smallest first, that makes the run fit."""
    for settings, changed in _changes(solver.run):
        other = dataclasses.replace(solver, run=changed)
        if other.leanest.nbytes <= solver.budget_bytes and (found := other.fastest()) is not None:
            return Change(settings, found)
    return None


def _changes(run: RunShape) -> Iterator[tuple[str, RunShape]]:
    """Smaller micro-batches, which compute the same; then with them what costs little of what is learnt, bit by bit."""
    total, said = run.batch * run.accumulation, ""
    for batch in range(run.batch - 1, 0, -1):
        if total % batch == 0:
            said = f"train.batch_size={batch} train.gradient_accumulation={total // batch}"
            run = dataclasses.replace(run, batch=batch, accumulation=total // batch)
            yield said, run
    lean: list[tuple[str, bool, dict[str, Any]]] = [
        ("train.cuda_graph=false", run.cuda_graph, {"cuda_graph": False}),
        ("optim.state_bits=8", run.state_bits == 32, {"state_bits": 8}),
        ("method=lora", run.method == "full", {"method": "lora", "storage_bytes": 2, "fused": True}),
        ("method=qlora", run.method != "qlora", {"method": "qlora", "storage_bytes": 2, "fused": True}),
    ]
    for setting, helps, change in lean:
        if helps:
            said, run = f"{said} {setting}".strip(), dataclasses.replace(run, **change)
            yield said, run
    length = run.seq_len
    while length > 256:
        length //= 2
        yield f"{said} data.max_length={length}".strip(), dataclasses.replace(run, seq_len=length)
