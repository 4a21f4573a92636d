"""The time of an optimizer step, from what it multiplies, moves and copies and from the rates of a card.

Calibrated on the profile of 8B at 4 x 2048 on an H100 (benchmarks/results/profile_*.txt); the shares that kernels reach
of a card's rates do not depend on the model but where products are small.
Legend: tokens of a micro-batch; a pass = forward, or the input gradients of backward, which multiply as much.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from nybble.plan import MemoryPlan
from nybble.planner.cards import DeviceSpec
from nybble.planner.prediction import StepTime
from nybble.planner.sizes import Product, Sizes
from nybble.planner.step import head_chunks
from nybble.planner.units import Unit, units_of

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
# What a streamed layer costs beside its copy: events, and kernels that wait for each other.
_STREAM_LATENCY_S = 30e-6


@dataclass(frozen=True)
class Clock:
    sizes: Sizes
    card: DeviceSpec
    plan: MemoryPlan

    @property
    def tokens(self) -> int:
        return self.sizes.run.tokens

    def step(self) -> StepTime:
        """Of all micro-batches, the update and, for a run without graphs, the launches."""
        run = self.sizes.run
        units = units_of(self.sizes, self.plan)
        forward, backward = self.forward_s(units) + self._head_s(), self.backward_s(units)
        copies = self._copies_s(units)
        update, update_copies = self._update_s()
        # The two directions of the link do not disturb each other; what hides, hides within one pass.
        passes = max(forward, copies[0]) + max(backward, copies[1])
        compute = run.accumulation * (forward + backward) + update
        slower = 1.0 if run.is_fused(self.sizes.model) else _STOCK
        compute, seconds = slower * compute, slower * (run.accumulation * passes + max(update, update_copies))
        launches = self._launches_s(units) * run.accumulation
        bound = "compute" if seconds <= 1.03 * compute else "host-to-device link"
        if launches > seconds:
            seconds, bound = launches, "kernel launches"
        return StepTime(seconds, compute, run.accumulation * sum(copies) + update_copies, bound)

    def forward_s(self, units: list[Unit]) -> float:
        return self.sizes.model.num_layers * self._layer_pass_s() + self._gaps(units, _KERNELS / 3)

    def backward_s(self, units: list[Unit]) -> float:
        alike = Counter((len(unit.halves), unit.halves[-1] % 2) for unit in units if not unit.kept)
        again = sum(count * self._again_s(*halves) for halves, count in alike.items())
        layers = self.sizes.model.num_layers * self._layer_backward_s()
        first = self._product_s(self.sizes.products[0])  # nobody wants the gradient of the embeddings
        return layers + again - first + self._gaps(units, 2 * _KERNELS / 3)

    def _gaps(self, units: list[Unit], kernels: float) -> float:
        recomputed = sum(len(unit.halves) / 2 for unit in units if not unit.kept)
        return _GAP_S * (kernels * self.sizes.model.num_layers + _KERNELS_AGAIN * recomputed / 2)

    def _layer_pass_s(self) -> float:
        products = sum(self._product_s(product) + self._dequantize_s(product) for product in self.sizes.products)
        return products + self._attention_s(0) + self._moved_s(self._values_forward())

    def _layer_backward_s(self) -> float:
        products = sum(self._product_s(product) + self._dequantize_s(product) for product in self.sizes.products)
        return products + self._attention_s(1) + self._moved_s(self._values_backward()) + self._low_rank_s()

    def _again_s(self, halves: int, mlp: int) -> float:
        """What the backward pass makes again of a unit of so many halves, the last of which is an MLP's or not.

        All but the last product; an MLP's first weight then serves the gradient as well.
        """
        whole = halves / 2 * self._layer_pass_s() if halves > 1 else self._half_s(mlp)
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

    def _head_s(self) -> float:
        """Logits and their gradient, always in the compute dtype."""
        model = self.sizes.model
        flops = 4 * self.tokens * model.embedding_weights
        logits = 3 * self.tokens * model.vocabulary * self.sizes.value
        return flops / self.card.bf16_flops + logits / self.card.bandwidth

    def _copies_s(self, units: list[Unit]) -> tuple[float, float]:
        """Seconds of the link's busier direction in each pass; layers that are there from one to the next stay."""
        streamed = self.plan.streamed()
        kept = min(len(streamed), self.plan.stream_slots * self.plan.span)
        weights = (len(streamed) - kept) * self.sizes.layer_weights / self.card.link
        stream = self.tokens * self.sizes.model.hidden * self.sizes.value / self.card.link
        offloaded = sum(unit.how == "offload" for unit in units) * stream
        head = 0.0
        if self.plan.head == "host":
            tokens, _ = head_chunks(self.sizes, self.tokens)
            head = -(-self.tokens // tokens) * self.sizes.vocabulary_matrix / self.card.link
        latency = _STREAM_LATENCY_S * len(streamed)
        return max(weights + head, offloaded) + latency, weights + offloaded + latency

    def _update_s(self) -> tuple[float, float]:
        """AdamW reads and writes all that is trained, its gradients and its moments; norm and zeroes read them too."""
        moments = sum(self.sizes.moments)
        moved = 2 * moments + 6 * self.sizes.masters
        copies = moments / self.card.link if self.plan.moments == "paged" else 0.0
        return moved / self.card.bandwidth, copies

    def _launches_s(self, units: list[Unit]) -> float:
        recomputed = sum(len(unit.halves) / 2 for unit in units if not unit.kept)
        if not self.sizes.run.is_fused(self.sizes.model):
            return _STOCK_LAYER_S * (self.sizes.model.num_layers + recomputed)
        if self.sizes.run.cuda_graph:
            return 0.0
        kernels = _KERNELS * self.sizes.model.num_layers + _KERNELS_AGAIN * recomputed
        return self.card.launch_s * kernels
