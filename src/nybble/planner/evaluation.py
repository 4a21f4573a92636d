"""How a model is held that is measured or asked, not trained: the fastest way that fits, by arithmetic alone.

Batches may be made smaller instead of sending weights away: what counts is the time that weights take a sequence.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from nybble.ops.head_chunks import CHUNK_BYTES
from nybble.plan import MemoryPlan, Place, Weights
from nybble.planner.candidates import Choices, Placement, ends
from nybble.planner.cards import DeviceSpec
from nybble.planner.cost import load_phase, workspaces
from nybble.planner.holdings import matrices, on_device, on_host
from nybble.planner.prediction import Phase
from nybble.planner.sizes import Sizes
from nybble.planner.stock import StockStep
from nybble.planner.tape import rounded


@dataclass(frozen=True)
class Sequences:
    """What goes through a model at a time: `count` sequences of `length` tokens at most.

    kept: tokens of each whose keys and values are kept, as answers need them.
    """

    count: int
    length: int
    kept: int = 0


@dataclass(frozen=True)
class Held:
    """A model as `plan` has it, with batches of 1 in `parts` of what was asked for.

    phases: what loading and measuring need; none where the sizes of the model are not known.
    """

    plan: MemoryPlan
    parts: int = 1
    phases: Mapping[str, Phase] = field(default_factory=dict)

    @property
    def device_bytes(self) -> int:
        return max((phase.device_bytes for phase in self.phases.values()), default=0)

    @property
    def host_bytes(self) -> int:
        return max((phase.host_bytes for phase in self.phases.values()), default=0)

    def batch(self, count: int) -> int:
        """Of so many sequences that were asked for, how many go at a time."""
        return max(1, count // self.parts)


@dataclass(frozen=True)
class Measuring:
    """The choice of how to hold a model of `sizes` while `work` goes through its stock modules.

    budget_bytes: of the device; None: there is no limit.
    """

    sizes: Sizes
    card: DeviceSpec
    work: Sequence[Sequences]
    fixed: Choices
    budget_bytes: int | None

    def fits(self, held: Held) -> bool:
        return self.budget_bytes is None or (
            held.device_bytes <= self.budget_bytes and held.host_bytes <= self.card.host_bytes
        )

    def fastest(self) -> Held:
        """Of those that fit; if none does, the one that needs the least."""
        found = list(self._candidates())
        fitting = [held for held in found if self.fits(held)]
        if fitting:
            return min(fitting, key=self._seconds)
        on_host = [held for held in found if held.host_bytes <= self.card.host_bytes]
        return min(on_host or found, key=lambda held: (held.device_bytes, self._seconds(held)))

    def _candidates(self) -> Iterator[Held]:
        """The simplest first: of each kind the one with the fewest layers away that fits, or all of them."""
        most = max((batch.count for batch in self.work), default=1)
        kinds: list[Weights] = ["streamed", "disk"] if self.fixed.in_files else ["streamed"]
        if self.fixed.weights != "auto":
            kinds = [self.fixed.weights]
        for parts in (2**halvings for halvings in range(most.bit_length())):
            for embedding, head in ends(self.fixed, tied=self.sizes.tied):
                for kind in kinds:
                    yield self._fewest_away(parts, embedding, head, kind)

    def _fewest_away(self, parts: int, embedding: Place, head: Place, kind: Weights) -> Held:
        layers = self.sizes.model.num_layers

        def held(streamed: int) -> Held:
            return self._held(Placement(embedding, head, "resident", streamed, kind), parts)

        if self.fixed.weights != "auto":
            return held(0 if kind == "resident" else layers)
        resident = held(0)
        if self.fits(resident):
            return resident
        counts = range(1, layers)
        return held(1 + bisect_left(counts, True, key=lambda count: self.fits(held(count))))

    def _held(self, placement: Placement, parts: int) -> Held:
        plan = placement.applied(MemoryPlan.uniform(self.sizes.model.num_layers))
        own = ("weights", "streaming slots", "adapters")  # what is trained has no gradient here
        device = dict.fromkeys(own, 0)
        for category, size in on_device(self.sizes, plan, moments_resident=False):
            if category in own:
                device[category] += rounded(size)
        device["workspaces"], device["context"] = workspaces(self.card), self.card.context_bytes
        taken = max((self._taken(plan, batch, parts) for batch in self.work), key=_total, default={})
        phases = {
            "load": load_phase(self.sizes, self.card, plan),
            "evaluation": Phase(device | taken, on_host(self.sizes, plan, 0)),
        }
        return Held(plan, parts, phases)

    def _taken(self, plan: MemoryPlan, batch: Sequences, parts: int) -> dict[str, int]:
        """By one batch. The last layer's keys and values are held twice while tokens are added to them."""
        model, value, count = self.sizes.model, self.sizes.value, max(1, batch.count // parts)
        taken = StockStep(self.sizes, plan, count * batch.length).evaluation()
        a_token = 2 * model.num_kv_heads * model.head_dim * value
        run, whole = self.sizes.run, model.embedding_weights * value
        passing = min(CHUNK_BYTES, whole) if plan.head == "host" else 0
        cast = whole if run.nf4_head or run.storage_bytes != value else 0
        return taken | {
            "keys and values": count * batch.kept * a_token * (model.num_layers + 1),
            "head": passing or cast,
        }

    def _seconds(self, held: Held) -> float:
        """That weights take for as many sequences as were asked for at a time; arithmetic is the same for all."""
        layers = [layer.weights for layer in held.plan.layers]
        head = self.sizes.vocabulary_matrix * (held.plan.head == "host")
        copied_s = (layers.count("streamed") * self._layer + head) / self.card.link
        read_s = layers.count("disk") * self._layer / self.card.disk
        all_s = (len(layers) * self._layer + self.sizes.vocabulary_matrix) / self.card.bandwidth
        return held.parts * (copied_s + read_s + all_s)

    @cached_property
    def _layer(self) -> int:
        return sum(matrices(self.sizes))


def _total(parts: Mapping[str, int]) -> int:
    return sum(parts.values())
