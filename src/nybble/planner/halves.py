"""What half a decoder layer takes from device memory, in the order in which `nybble.models.fused` does.

Written beside `block.py`, `regions.py` and `projection.py` there: a region's saved tensors live until its backward pass
is done, all others as long as a local name or an argument holds them. tests/planner compare the two.
Names: h, the stream at the norm; wide, what the first projection gives; out, what is to be added to the stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from nybble.ops.stripes import Stripes, largest_rank
from nybble.planner.cards import DeviceSpec
from nybble.planner.sizes import Product, Sizes
from nybble.planner.tape import Tape

Kind = Literal["attention", "mlp"]

_FP32 = 4
# Of cuDNN's and FlashAttention's random state, which is there without dropout too.
_SEED = 8


@dataclass(frozen=True)
class Saved:
    """How much of a half the backward pass finds.

    regions: whether all that its regions save (else nothing but the stream, or not even that). normed: whether that
    includes the norm's output.
    """

    regions: bool
    normed: bool = True


@dataclass(frozen=True)
class HalfTape:
    """Writes what one half of a layer takes, for `tokens` rows at a time.

    first: the half reads the embeddings, which nothing was added to. held: names of materialized weights that stay once
    they are made; see `holding`.
    """

    sizes: Sizes
    card: DeviceSpec
    kind: Kind
    tokens: int
    first: bool = False
    held: set[str] = field(default_factory=set)

    @property
    def fp8(self) -> bool:
        return self.sizes.run.precision == "fp8"

    @cached_property
    def into(self) -> Product:
        """The projection out of the stream: q, k and v, or gate and up."""
        return self.sizes.products[0 if self.kind == "attention" else 2]

    @cached_property
    def back(self) -> Product:
        """The projection back to it: attention's output, or down."""
        return self.sizes.products[1 if self.kind == "attention" else 3]

    @property
    def sandwiched(self) -> bool:
        """Whether what the half gives is normed before it is added to the stream."""
        return self.sizes.model.norms == 4

    def rows(self, width: int, value: int | None = None) -> int:
        """Bytes of `width` values for each token, of `value` bytes each (None: of the compute dtype)."""
        return self.tokens * width * (self.sizes.value if value is None else value)

    @property
    def stream(self) -> int:
        return self.rows(self.sizes.model.hidden)

    # The forward pass

    def forward(self, tape: Tape, saved: Saved, *, known: bool = False, replay: bool = False) -> None:
        """Leaves h, rstd, out and narrow_out, and what is saved. known, replay: as `Half` takes them."""
        if not (known or self.first):
            tape.take("h", self.stream, "stream")
        tape.take("normed", self.stream, "norms")
        if not known:
            tape.take("rstd", self.rows(1, _FP32), "norms")
        with self._in_fp8(tape, self.into.inputs):  # which the norm makes too
            with self._weight(tape, self.into):
                tape.take("wide", self.rows(self.into.outputs), self.kind)
            self._narrow(tape, self.into, "narrow")
        if not (saved.regions and saved.normed and self.into.parts):
            tape.drop("normed")
        if self.kind == "attention":
            self._attend(tape, saved, replay=replay)
        else:
            self._gate(tape, saved, replay=replay)
        if self.sandwiched:
            for name, size in (("h_after", self.stream), ("normed_out", self.stream)):
                tape.take(name, size, "norms")
            tape.take("rstd_after", self.rows(1, _FP32), "norms")
            tape.drop("out", *(() if saved.regions else ("h_after", "rstd_after", "narrow_out")))

    def _attend(self, tape: Tape, saved: Saved, *, replay: bool) -> None:
        model = self.sizes.model
        widths = {"q": model.num_heads, "k": model.num_kv_heads, "v": model.num_kv_heads}
        for name, heads in widths.items():
            tape.take(name, self.rows(heads * model.head_dim), "attention")
        if not (saved.regions and model.head_norms):
            tape.drop("wide")
        if not saved.regions:
            tape.drop("narrow")
        tape.take("heads", self.rows(model.num_heads * model.head_dim), "attention")
        if saved.regions:
            tape.take("lse", self.rows(model.num_heads, _FP32), "attention")
            tape.take("seed", _SEED, "attention")
            tape.take("offset", _SEED, "attention")
        self._project_back(tape, replay=replay)
        if not saved.regions:
            tape.drop("heads", "q", "k", "v")

    def _gate(self, tape: Tape, saved: Saved, *, replay: bool) -> None:
        with tape.during("act", self.rows(self.sizes.model.intermediate), "mlp"):
            self._project_back(tape, replay=replay)
        if not saved.regions:
            tape.drop("wide", "narrow")

    def _project_back(self, tape: Tape, *, replay: bool) -> None:
        if replay and not self.sandwiched:
            tape.take("out", 1, "stream")
        else:
            with self._weight(tape, self.back), self._in_fp8(tape, self.back.inputs):
                tape.take("out", self.rows(self.back.outputs), "stream")
        self._narrow(tape, self.back, "narrow_out")

    def _narrow(self, tape: Tape, product: Product, name: str) -> None:
        if product.parts:
            tape.take(name, self.rows(product.narrow), "low rank")

    @contextmanager
    def _weight(self, tape: Tape, product: Product, *, gradient: bool = False) -> Iterator[None]:
        """The weight as it is multiplied, and what it is made with; one that is held stays."""
        name = self._weight_name(product, gradient=gradient)
        if name in self.held and tape.has(name):
            yield
            return
        if size := self.sizes.materialized(product):
            tape.take(name, size, "materialized weights")
        if self.fp8:
            tape.take(f"{name}_scale", product.outputs * _FP32, "materialized weights")
            tape.touch("units", self.sizes.units(product), "materialized weights")
        yield
        if name not in self.held:
            tape.drop(name, f"{name}_scale")

    def _weight_name(self, product: Product, *, gradient: bool) -> str:
        # In fp8 the two directions want a layout of their own.
        return ("into" if product is self.into else "back") + ("_transposed" if self.fp8 and gradient else "")

    @contextmanager
    def holding(self, tape: Tape) -> Iterator[None]:
        """Within, the materialized weights stay once they are made."""
        products, ways = (self.into, self.back), (False, True)
        self.held.update(self._weight_name(product, gradient=way) for product in products for way in ways)
        yield
        self.let_go(tape)

    def let_go(self, tape: Tape) -> None:
        for name in sorted(self.held):
            tape.drop(name, f"{name}_scale")
        self.held.clear()

    @contextmanager
    def _in_fp8(self, tape: Tape, width: int) -> Iterator[None]:
        """The rows that are multiplied, where the product is in fp8."""
        if not self.fp8:
            yield
            return
        scale = tape.during("rows_scale", self.rows(1, _FP32), "workspaces")
        with tape.during("rows_fp8", self.rows(width, 1), "workspaces"), scale:
            yield

    # The backward pass

    def backward(self, tape: Tape, saved: Saved, *, frozen_before: bool = False, once: bool = False) -> None:
        """From the gradient of what the half gives to d, that of what it reads; gives back what was saved.

        frozen_before: nothing before it is trained, so there is no d. once: held weights are let go after one gradient.
        """
        if self.sandwiched:
            tape.take("d_after", self.stream, "activation gradients")
            tape.drop("h_after", "rstd_after")
        if self.kind == "attention":
            self._back_through_attention(tape)
        else:
            self._back_through_gate(tape)
        self._low_rank_gradients(tape, self.into, "d_narrow")
        if not saved.normed and self.into.parts:
            tape.take("normed", self.stream, "norms")
        if not frozen_before:
            with self._weight(tape, self.into, gradient=True), self._in_fp8(tape, self.into.outputs):
                tape.take("d_normed", self.stream, "activation gradients")
            if once:
                self.let_go(tape)
            tape.take("d", self.stream, "activation gradients")
        tape.drop("d_normed", "d_wide", "wide", "d_narrow", "narrow", "normed")

    def _back_through_attention(self, tape: Tape) -> None:
        model = self.sizes.model
        width, kv_width = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        self._low_rank_gradients(tape, self.back, "d_narrow_out")
        with self._weight(tape, self.back, gradient=True), self._in_fp8(tape, self.back.outputs):
            tape.take("d_heads", self.rows(width), "activation gradients")
        tape.drop("d_narrow_out", "narrow_out", "d_after", "out", "normed_out")
        for name, columns in {"d_q": width, "d_k": kv_width, "d_v": kv_width}.items():
            tape.take(name, self.rows(columns), "activation gradients")
        # dq summed in fp32, rows of sum(dO * O), and where heads share keys a dk and dv for each head.
        shared = 2 * self.rows(width) if model.num_kv_heads < model.num_heads else 0
        rows = self.rows(model.num_heads, _FP32)
        tape.touch("attention_workspace", self.rows(width, _FP32) + shared + rows, "workspaces")
        tape.drop("d_heads", "heads", "q", "k", "v", "lse", "seed", "offset")
        tape.take("d_wide", self.rows(self.into.outputs), "activation gradients")
        tape.drop("d_q", "d_k", "d_v")

    def _back_through_gate(self, tape: Tape) -> None:
        self._low_rank_gradients(tape, self.back, "d_narrow_out")
        with self._weight(tape, self.back, gradient=True), self._in_fp8(tape, self.back.outputs):
            tape.take("act", self.rows(self.sizes.model.intermediate), "mlp")
        tape.drop("act", "d_narrow_out", "narrow_out", "d_after", "out", "normed_out")

    def _low_rank_gradients(self, tape: Tape, product: Product, d_narrow: str) -> None:
        if not product.parts:
            return
        tape.take(d_narrow, self.rows(product.narrow), "low rank")
        if product.rank <= largest_rank(self.card.capability):
            sizes = (product.outputs,) if product.parts == 1 else tuple(linear.outputs for linear in product.linears)
            card = self.card
            stripes = Stripes.of(card.capability, card.multiprocessors, self.tokens, product.rank, sizes)
            with tape.during("narrow_pieces", stripes.count * self.rows(product.rank, _FP32), "workspaces"):
                tape.touch("B_pieces", stripes.pieces * product.outputs * product.rank * _FP32, "workspaces")
        else:
            tape.touch("narrow_sum", self.rows(product.rank, _FP32), "workspaces")
