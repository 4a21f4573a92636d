"""A micro-batch from the embeddings to the last gradient, and a batch that is evaluated: what they take, in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from nybble.ops.head_chunks import CHUNK_BYTES, ChunkSizes
from nybble.plan import MemoryPlan, Place
from nybble.planner.cards import DeviceSpec
from nybble.planner.sizes import Sizes
from nybble.planner.tape import Extent, Passage, Tape
from nybble.planner.units import Unit, Walk, units_of, walk_of

_FP32, _INT64 = 4, 8
_LOGITS_BYTES, _TILE = 256 * 2**20, 128  # of a chunk of the loss: `nybble.models.fused.loss`


@dataclass(frozen=True)
class MicroBatch:
    """batch sequences of seq_len tokens under `plan`."""

    sizes: Sizes
    card: DeviceSpec
    plan: MemoryPlan
    batch: int
    seq_len: int

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len

    @cached_property
    def units(self) -> list[Unit]:
        """Of training."""
        return units_of(self.sizes, self.plan)

    def training(self) -> list[Passage]:
        return [self._slots(), *self._forward(self.units), self._loss(gradients=True), *self._backward()]

    def evaluation(self) -> list[Passage]:
        units = [
            Unit(
                "evaluate by rows" if layer.activations in ("recompute", "offload") else "evaluate",
                range(2 * number, 2 * number + 2),
            )
            for number, layer in enumerate(self.plan.layers)
        ]
        return [self._slots(), *self._forward(units), self._loss(gradients=False)]

    def host_bytes(self, units: Sequence[Unit]) -> int:
        """Of what `units` keep on the host between the passes of training."""
        return self._walk.host_bytes(units)

    def peaks(self, heads: Iterable[Place]) -> dict[Place, int]:
        """The most bytes that training takes, by where the head lies: the layers take the same wherever that is."""
        forward, backward = Extent.of(self._forward(self.units)), Extent.of(self._backward())
        found: dict[Place, int] = {}
        for head in heads:
            there = replace(self, plan=replace(self.plan, head=head))
            slots, loss = Extent.of([there._slots()]), Extent.of([there._loss(gradients=True)])
            found[head] = slots.then(forward).then(loss).then(backward).rise
        return found

    @property
    def _stream(self) -> int:
        return self.tokens * self.sizes.model.hidden * self.sizes.value

    @property
    def _walk(self) -> Walk:
        return walk_of(self.sizes, self.card, self.tokens, self.plan.mlp_rows)

    @property
    def _last_norm(self) -> dict[str, int]:
        """What it gives, and what it saves."""
        return {"@h": self._stream, "@hidden": self._stream, "@rstd": self.tokens * _FP32}

    @property
    def _rotations(self) -> dict[str, int]:
        size = self.tokens * self.sizes.model.rotary_dim * self.sizes.value
        return {f"@{name} {number}": size for number in range(self.sizes.model.rotations) for name in ("cos", "sin")}

    def _forward(self, units: list[Unit]) -> Iterator[Passage]:
        """From the embeddings to the last norm."""
        tape = Tape()
        tape.take("h", self._stream, "stream")
        for name, size in self._rotations.items():
            tape.take(name, size, "rotations")
        yield 0, tape.cut()
        yield from self._walk.forward(units)
        for name, size in self._last_norm.items():
            tape.take(name, size, "stream")
        yield 0, tape.cut()
        yield self._walk.end_of_forward(units)

    def _loss(self, *, gradients: bool) -> Passage:
        tape = Tape()
        for name, size in self._last_norm.items():
            tape.find(name, size)
        if not gradients:
            tape.drop("@h", "@rstd")
            self._drop_rotations(tape)
        tape.take("@targets", self.tokens * _INT64, "loss")
        if self.plan.head == "host" or self.sizes.run.nf4_head:
            self._under_passing_head(tape, gradients=gradients)
        else:
            self._under_whole_head(tape, gradients=gradients)
        tape.drop("@targets")
        return 0, tape.cut()

    def _backward(self) -> Iterator[Passage]:
        tape = Tape()
        for name, size in self._last_norm.items():
            tape.find(name, size)
        tape.take(">d", self._stream, "activation gradients")
        tape.drop("@hidden", "@h", "@rstd")
        yield self.units[-1].halves[-1], tape.cut()
        yield from self._walk.backward(self.units)
        tape = Tape()
        self._drop_rotations(tape)
        yield 0, tape.cut()

    def _drop_rotations(self, tape: Tape) -> None:
        for name, size in self._rotations.items():
            tape.find(name, size)
            tape.drop(name)

    def _under_whole_head(self, tape: Tape, *, gradients: bool) -> None:
        """A few rows at a time."""
        vocabulary, value = self.sizes.model.vocabulary, self.sizes.value
        rows = min(self.tokens, max(_TILE, _LOGITS_BYTES // (value * vocabulary) // _TILE * _TILE))
        cast = self.sizes.run.storage_bytes != self.sizes.run.compute_bytes
        logits = tape.during("@logits", rows * vocabulary * value, "loss")
        with tape.during("@head", self.sizes.model.embedding_weights * value * cast, "materialized weights"), logits:
            if gradients:
                tape.touch("@d_rows", rows * self.sizes.model.hidden * value, "loss")
        if not gradients:
            tape.drop("@hidden")

    def _under_passing_head(self, tape: Tape, *, gradients: bool) -> None:
        """By chunks of the head too, from host memory or out of NF4."""
        chunks, model = head_chunks(self.sizes, self.tokens), self.sizes.model
        hidden, value = model.hidden, self.sizes.value
        rows = min(chunks.tokens, self.tokens)
        tape.take("@state", 3 * rows * _FP32, "loss")
        if gradients:
            tape.take("@gradient", rows * hidden * _FP32, "loss")
            tape.take("@target_rows", rows * hidden * value, "loss")
        run = self.sizes.run
        made = run.nf4_head or run.storage_bytes != run.compute_bytes
        if run.nf4_head:
            tape.take("@absmax", run.nf4.num_blocks(model.embedding_weights) * _FP32, "loss")
        with tape.during("@made", min(chunks.vocabulary, model.vocabulary) * hidden * value * made, "loss"):
            tape.touch("@logits", rows * chunks.vocabulary * value, "loss")
        tape.drop("@state", "@gradient", "@target_rows", "@absmax")
        for name, size in self._slot_sizes.items():
            tape.find(name, size)
            tape.drop(name)
        if not gradients:
            tape.drop("@hidden")

    def _slots(self) -> Passage:
        """Taken before all else, as the head sets off with the forward pass."""
        tape = Tape()
        for name, size in self._slot_sizes.items():
            tape.take(name, size, "loss")
        return 0, tape.cut()

    @property
    def _slot_sizes(self) -> dict[str, int]:
        """Through which the head passes from the host: two, if it comes in more than one chunk."""
        if self.plan.head != "host":
            return {}
        chunks, vocabulary = head_chunks(self.sizes, self.tokens), self.sizes.model.vocabulary
        count = -(-self.tokens // chunks.tokens) * -(-vocabulary // chunks.vocabulary)
        size = min(chunks.vocabulary, vocabulary) * self.sizes.model.hidden * self.sizes.run.storage_bytes
        return {f"@slot {number}": size for number in range(min(2, count))}


def head_chunks(sizes: Sizes, tokens: int) -> ChunkSizes:
    """Tokens and words at a time under a head that passes: slots of the host's, or what NF4 is made into."""
    hidden, value, stored = sizes.model.hidden, sizes.value, sizes.run.storage_bytes
    slots = hidden * (2 * stored + (0 if stored == value else value))
    a_row = hidden * value if sizes.run.nf4_head else slots
    return ChunkSizes.within(CHUNK_BYTES, tokens, sizes.model.vocabulary, hidden, value_bytes=value, bytes_a_row=a_row)
