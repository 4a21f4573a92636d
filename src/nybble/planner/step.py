"""A micro-batch from the embeddings to the last gradient, and a batch that is evaluated: what they take, in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from nybble.ops.head_chunks import CHUNK_BYTES, ChunkSizes
from nybble.plan import MemoryPlan
from nybble.planner.cards import DeviceSpec
from nybble.planner.sizes import Sizes
from nybble.planner.tape import Passage, Tape
from nybble.planner.units import Passages, Unit, passages_of, units_of

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
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", self.batch * self.seq_len)

    def training(self) -> list[Passage]:
        passages = passages_of(self.sizes, self.card, self.tokens, self.plan.mlp_rows)
        units = units_of(self.sizes, self.plan)
        return [*self._forward(passages, units, gradients=True), *self._backward(passages, units)]

    def evaluation(self) -> list[Passage]:
        passages = passages_of(self.sizes, self.card, self.tokens, self.plan.mlp_rows)
        units = [
            Unit("pass by rows" if layer.activations in ("recompute", "offload") else "pass", halves)
            for layer, halves in zip(self.plan.layers, _layers(self.sizes), strict=True)
        ]
        return list(self._forward(passages, units, gradients=False))

    @property
    def _stream(self) -> int:
        return self.tokens * self.sizes.model.hidden * self.sizes.value

    def _forward(self, passages: Passages, units: list[Unit], *, gradients: bool) -> Iterator[Passage]:
        tape = Tape()
        for name, size in self._slots():
            tape.take(name, size, "loss")
        rotations = self.tokens * self.sizes.model.rotary_dim * self.sizes.value
        tape.take("h", self._stream, "stream")
        for number in range(self.sizes.model.rotations):
            tape.take(f"@cos {number}", rotations, "rotations")
            tape.take(f"@sin {number}", rotations, "rotations")
        yield 0, tape.cut()
        yield from passages.forward(units)
        tape = Tape()
        for name, size in (("@h", self._stream), ("@hidden", self._stream), ("@rstd", self.tokens * _FP32)):
            tape.take(name, size, "stream")
        yield 0, tape.cut()
        yield passages.end_of_forward(units)
        if not gradients:
            tape.drop("@h", "@rstd")
            self._drop_rotations(tape)
        tape.take("@targets", self.tokens * _INT64, "loss")
        if self.plan.head == "host" or self.sizes.run.nf4_head:
            self._passing_loss(tape, gradients=gradients)
        else:
            self._loss(tape, gradients=gradients)
        tape.drop("@targets")
        yield 0, tape.cut()

    def _backward(self, passages: Passages, units: list[Unit]) -> Iterator[Passage]:
        tape = Tape()
        for name, size in (("@h", self._stream), ("@hidden", self._stream), ("@rstd", self.tokens * _FP32)):
            tape.find(name, size)
        tape.take(">d", self._stream, "activation gradients")
        tape.drop("@hidden", "@h", "@rstd")
        yield units[-1].halves[-1], tape.cut()
        yield from passages.backward(units)
        tape = Tape()
        self._drop_rotations(tape)
        yield 0, tape.cut()

    def _drop_rotations(self, tape: Tape) -> None:
        for number in range(self.sizes.model.rotations):
            for name in (f"@cos {number}", f"@sin {number}"):
                tape.find(name, self.tokens * self.sizes.model.rotary_dim * self.sizes.value)
                tape.drop(name)

    def _loss(self, tape: Tape, *, gradients: bool) -> None:
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

    def _passing_loss(self, tape: Tape, *, gradients: bool) -> None:
        """Under a head that passes by chunks, from host memory or out of NF4."""
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
        for name, size in self._slots():
            tape.find(name, size)
            tape.drop(name)
        if not gradients:
            tape.drop("@hidden")

    def _slots(self) -> list[tuple[str, int]]:
        """Through which the head passes from the host: two, if it comes in more than one chunk."""
        if self.plan.head != "host":
            return []
        chunks, vocabulary = head_chunks(self.sizes, self.tokens), self.sizes.model.vocabulary
        count = -(-self.tokens // chunks.tokens) * -(-vocabulary // chunks.vocabulary)
        size = min(chunks.vocabulary, vocabulary) * self.sizes.model.hidden * self.sizes.run.storage_bytes
        return [(f"@slot {number}", size) for number in range(min(2, count))]


def head_chunks(sizes: Sizes, tokens: int) -> ChunkSizes:
    """Tokens and words at a time under a head that passes: slots of the host's, or what NF4 is made into."""
    hidden, value, stored = sizes.model.hidden, sizes.value, sizes.run.storage_bytes
    slots = hidden * (2 * stored + (0 if stored == value else value))
    a_row = hidden * value if sizes.run.nf4_head else slots
    return ChunkSizes.within(CHUNK_BYTES, tokens, sizes.model.vocabulary, hidden, value_bytes=value, bytes_a_row=a_row)


def _layers(sizes: Sizes) -> list[range]:
    return [range(2 * layer, 2 * layer + 2) for layer in range(sizes.model.num_layers)]
