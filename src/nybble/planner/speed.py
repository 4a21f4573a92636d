"""The time of an optimizer step, from what it multiplies, moves and copies and from the rates of a card.

Calibrated on the profile of 8B at 4 x 2048 on an H100 (benchmarks/results/profile_*.txt); the shares that kernels reach
of a card's rates do not depend on the model but where products are small.
Legend: tokens of a micro-batch; a pass = forward, or the input gradients of backward, which multiply as much.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from nybble.plan import MemoryPlan, Place
from nybble.planner.cards import DeviceSpec
from nybble.planner.prediction import StepTime
from nybble.planner.sizes import Product, Sizes
from nybble.planner.step import MicroBatch, head_chunks
from nybble.planner.units import Unit

# Attention against products: cuDNN reaches 511 and 367 TFLOP/s in the two passes, of 735; FlashAttention 2, for packed
# rows and other chips, 284 and 201.
_CUDNN, _FLASH = (0.70, 0.50), (0.39, 0.27)
# Products of so many operations reach half of the rate; 8B's, of 70 to 970 G at 2,048 tokens, 0.92 and more of it.
_HALF_RATE_FLOPS = 6e9
# A kernel in a CUDA graph starts so long after the one before has ended.
_GAP_S = 1.4e-6
# Kernels a layer: forward and backward as regions launch them, and of what is made again.
_KERNELS, _KERNELS_AGAIN = 65, 22
# Products with low-rank pairs read what the bandwidth allows at this share.
_LOW_RANK = 0.55
# Stock modules: against fused ones, and what the host needs for a layer of them, again where it is recomputed.
_STOCK, _STOCK_LAYER_S = 1.55, 7e-3
# The link's rate in either direction while it is busy in both: 50.2 of 55.3 GB/s, measured on an H200.
_BOTH_WAYS = 0.91
# Compute and copies that take about as long wait for each other now and then: together 1.12 times as long. And what a
# layer that keeps its activations on the host costs beside, in each pass. Both fitted to nine such runs on an H200.
_WAITING = 6
_ON_HOST_LATENCY_S = 0.5e-3
# What a streamed layer costs beside its copy: events, and kernels that wait for each other.
_STREAM_LATENCY_S = 30e-6


@dataclass(frozen=True)
class Stretch:
    """Layers beside which what they keep on the host has to pass the link, in each pass.

    share: of all layers.
    """

    share: float
    forward_s: float
    backward_s: float
    on_host_bytes: int


@dataclass(frozen=True)
class Passes:
    """Both passes of a micro-batch over its layers: the stretches of them, and how often there is one like it.

    recomputed: layers.
    """

    stretches: Mapping[Stretch, int]
    recomputed: float

    @property
    def on_host_bytes(self) -> int:
        """Of activations."""
        return sum(count * stretch.on_host_bytes for stretch, count in self.stretches.items())


@dataclass(frozen=True)
class Clock:
    sizes: Sizes
    card: DeviceSpec

    def passes(self, micro_batch: MicroBatch) -> Passes:
        """A layer that keeps all on the host begins a stretch: its copies have until the next such layer."""
        units = micro_batch.units
        borders = [0, *(number for number, unit in enumerate(units) if unit.on_host and number), len(units)]
        stretches = [units[start:end] for start, end in pairwise(borders)]
        alike = {tuple(map(_kind, stretch)): stretch for stretch in stretches}  # few, so that a search takes no time
        counts = Counter(tuple(map(_kind, stretch)) for stretch in stretches)
        counted: Counter[Stretch] = Counter()
        for kinds, count in counts.items():
            counted[self._stretch(alike[kinds], micro_batch)] += count
        recomputed = sum(len(unit.halves) / 2 for unit in units if not unit.kept)
        return Passes(counted, recomputed)

    def _stretch(self, units: Sequence[Unit], micro_batch: MicroBatch) -> Stretch:
        layers = sum(len(unit.halves) for unit in units) / 2
        alike = Counter((len(unit.halves), unit.halves[-1] % 2) for unit in units if not unit.kept)
        recomputed = sum(halves / 2 * count for (halves, _), count in alike.items())
        again = sum(count * self._again_s(*halves) for halves, count in alike.items())
        # Nobody wants the gradient of the embeddings, unless they are in training.
        is_first = units[0].halves[0] == 0 and not self._trains_weights
        spared = self._product_s(self.sizes.products[0]) if is_first else 0.0
        both = sum(unit.on_host for unit in units) * _ON_HOST_LATENCY_S
        forward_s = layers * (self._layer_pass_s + _KERNELS / 3 * _GAP_S) + both
        backward_s = layers * (self._layer_backward_s + 2 * _KERNELS / 3 * _GAP_S) + both
        backward_s += again + recomputed * _KERNELS_AGAIN * _GAP_S - spared
        return Stretch(layers / self.sizes.model.num_layers, forward_s, backward_s, micro_batch.host_bytes(units))

    def of_plan(self, plan: MemoryPlan) -> StepTime:
        """An optimizer step under `plan`."""
        streamed = plan.streamed()
        from_disk = any(plan.layers[layer].weights == "disk" for layer in streamed)
        weights_s = self.weights_s(len(streamed), plan.stream_slots * plan.span, from_disk=from_disk)
        micro_batch = MicroBatch(self.sizes, self.card, plan, self.sizes.run.batch, self.sizes.run.seq_len)
        return self.step(self.passes(micro_batch), weights_s, head=plan.head, moments=plan.moments)

    def weights_s(self, streamed: int, stay: int, *, from_disk: bool) -> float:
        """In which so many layers are copied once, but for those that stay from one pass to the next."""
        link = min(self.card.link, self.card.disk) if from_disk else self.card.link
        return max(0, streamed - stay) * self.sizes.layer_weights / link + _STREAM_LATENCY_S * streamed

    def step(self, passes: Passes, weights_s: float, *, head: Place, moments: str) -> StepTime:
        """All micro-batches and the update. weights_s: in which the streamed layers are copied once."""
        run = self.sizes.run
        slower = 1.0 if run.is_fused(self.sizes.model) else _STOCK
        update, update_copies = slower * self._update_s, self._moments_copies_s if moments == "paged" else 0.0
        compute, copies, seconds = update, update_copies, max(update, update_copies)
        head_copies_s = self._head_copies_s if head == "host" else 0.0
        for stretch, count in passes.stretches.items():
            times, share = run.accumulation * count, stretch.share
            forward, backward = slower * (stretch.forward_s + share * self._head_s), slower * stretch.backward_s
            # Both directions of the link go on at once; what hides, hides within one pass.
            on_host_s = stretch.on_host_bytes / self.card.link
            forward_copies = _both_ways(share * (weights_s + head_copies_s), on_host_s)
            backward_copies = share * weights_s + on_host_s
            compute += times * (forward + backward)
            copies += times * (forward_copies + backward_copies)
            seconds += times * (_beside(forward, forward_copies) + _beside(backward, backward_copies))
        bound = "compute" if copies < compute or seconds <= 1.03 * compute else "host-to-device link"
        launches = run.accumulation * self._launches_s(passes.recomputed)
        if launches > seconds:
            seconds, bound = launches, "kernel launches"
        return StepTime(seconds, compute, copies, bound)

    @property
    def tokens(self) -> int:
        return self.sizes.run.tokens

    @property
    def _trains_weights(self) -> bool:
        """So that the backward pass multiplies for their gradients as well."""
        return self.sizes.run.method == "full"

    @cached_property
    def _layer_pass_s(self) -> float:
        products = sum(self._product_s(product) + self._dequantize_s(product) for product in self.sizes.products)
        return products + self._attention_s(0) + self._moved_s(self._values_forward())

    @cached_property
    def _layer_backward_s(self) -> float:
        products = sum(self._product_s(product) + self._dequantize_s(product) for product in self.sizes.products)
        products += sum(map(self._product_s, self.sizes.products)) if self._trains_weights else 0.0
        return products + self._attention_s(1) + self._moved_s(self._values_backward()) + self._low_rank_s()

    def _again_s(self, halves: int, mlp: int) -> float:
        """What the backward pass makes again of a unit of so many halves, the last of which is an MLP's or not.

        All but the last product; an MLP's first weight then serves the gradient as well.
        """
        whole = halves / 2 * self._layer_pass_s if halves > 1 else self._half_s(mlp)
        last = self.sizes.products[3 if mlp else 1]
        spared = self._product_s(last) + self._dequantize_s(last)
        return whole - spared - (self._dequantize_s(self.sizes.products[2]) if mlp else 0.0)

    def _half_s(self, mlp: int) -> float:
        products = self.sizes.products[2:] if mlp else self.sizes.products[:2]
        made = sum(self._product_s(product) + self._dequantize_s(product) for product in products)
        values = self._values_forward() - 3 * self.sizes.model.intermediate  # of both halves alike
        moved = self._moved_s(values / 2 + (3 * self.sizes.model.intermediate if mlp else 0))
        return made + moved + (0.0 if mlp else self._attention_s(0))

    def _product_s(self, product: Product) -> float:
        flops = 2 * self.tokens * product.weights
        fp8 = self.sizes.run.precision == "fp8" and self.card.fp8_flops > 0
        rate = self.card.fp8_flops if fp8 else self.card.bf16_flops
        narrow = 2 * self.tokens * product.inputs * self.sizes.value / (self.card.bandwidth * _LOW_RANK)
        quantize = self.tokens * (product.inputs * 3) / self.card.bandwidth if fp8 else 0.0
        return (flops + _HALF_RATE_FLOPS) / rate + quantize + (narrow / 2 if product.parts else 0.0)

    def _dequantize_s(self, product: Product) -> float:
        if not self.sizes.materialized(product):
            return 0.0
        stored = 0.516 if self.sizes.run.method == "qlora" else self.sizes.run.storage_bytes
        return (product.weights * stored + 1.3 * self.sizes.materialized(product)) / self.card.bandwidth

    def _attention_s(self, backward: int) -> float:
        """Within the causal triangle, a window or a sample; the backward pass multiplies 2.5 times as much."""
        model, run = self.sizes.model, self.sizes.run
        packed = run.samples_a_row > 1
        total = 0.0
        for window in model.windows:
            seen = run.seq_len / 2 / max(1, run.samples_a_row - 1 if packed else 1)
            seen = min(seen, window) if window else seen
            fast = self.card.capability[0] in (9, 10) and not packed and not window and not run.deterministic
            share = (_CUDNN if fast else _FLASH)[backward]
            flops = 4 * self.tokens * seen * model.num_heads * model.head_dim * (2.5 if backward else 1)
            total += flops / (self.card.bf16_flops * share)
        return total / model.num_layers

    def _values_forward(self) -> float:
        """Values a token that elementwise kernels read and write in one layer."""
        model = self.sizes.model
        heads = sum(linear.outputs for linear in model.projections[0])
        return (4 * model.hidden) * model.norms + 2 * heads + 3 * model.intermediate

    def _values_backward(self) -> float:
        model = self.sizes.model
        heads = sum(linear.outputs for linear in model.projections[0])
        # Of attention: sums of dO * O, gradients of queries rounded, keys and values summed over heads that share them.
        return (
            (5 * model.hidden) * model.norms
            + 2 * heads
            + 6.5 * model.intermediate
            + 8 * model.num_heads * model.head_dim
        )

    def _moved_s(self, values: float) -> float:
        return self.tokens * values * self.sizes.value / self.card.bandwidth

    def _low_rank_s(self) -> float:
        """Both gradients of each pair read what flows back once, and the inputs once more."""
        values = sum(product.outputs + 2 * product.inputs for product in self.sizes.products if product.parts)
        wide = 1 + self.sizes.run.rank / 96
        return self.tokens * values * self.sizes.value * wide / (self.card.bandwidth * 2 * _LOW_RANK)

    @cached_property
    def _head_s(self) -> float:
        """Logits and their gradient, always in the compute dtype."""
        model = self.sizes.model
        flops = (6 if self._trains_weights else 4) * self.tokens * model.embedding_weights
        moved = 3.0 * self.tokens * model.vocabulary * self.sizes.value
        if self.sizes.run.nf4_head:
            passes = -(-self.tokens // head_chunks(self.sizes, self.tokens).tokens)
            moved += passes * (sum(self.sizes.head) + 1.3 * model.embedding_weights * self.sizes.value)
        return flops / self.card.bf16_flops + moved / self.card.bandwidth

    @cached_property
    def _head_copies_s(self) -> float:
        """It crosses the link once for some thousands of tokens."""
        chunks = head_chunks(self.sizes, self.tokens)
        return -(-self.tokens // chunks.tokens) * self.sizes.vocabulary_matrix / self.card.link

    @cached_property
    def _update_s(self) -> float:
        """By kernels. The norm and zeroing read and write gradients too."""
        return (2 * sum(self.sizes.moments) + 6 * self.sizes.trained) / self.card.bandwidth

    @cached_property
    def _moments_copies_s(self) -> float:
        """Of paged moments, into each of the link's directions."""
        return sum(self.sizes.moments) / self.card.link

    def _launches_s(self, recomputed: float) -> float:
        run, layers = self.sizes.run, self.sizes.model.num_layers
        if not run.is_fused(self.sizes.model):
            return _STOCK_LAYER_S * (layers + recomputed)
        return 0.0 if run.cuda_graph else self.card.launch_s * (_KERNELS * layers + _KERNELS_AGAIN * recomputed)


def _kind(unit: Unit) -> tuple[str, int, int, bool]:
    """All that the time of a unit depends on."""
    return unit.how, len(unit.halves), unit.halves[-1] % 2, unit.halves[0] == 0


def _both_ways(one_s: float, other_s: float) -> float:
    """The time of copies in both directions at once, which would take so long alone."""
    return max(one_s, other_s) + (1 / _BOTH_WAYS - 1) * min(one_s, other_s)


def _beside(compute_s: float, copies_s: float) -> float:
    """The time of compute with copies beside it."""
    longer, shorter = max(compute_s, copies_s), min(compute_s, copies_s)
    return longer * math.pow(1 + (shorter / longer) ** _WAITING, 1 / _WAITING)
