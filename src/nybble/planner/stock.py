"""What stock modules take, as models without fused regions run: estimates by the tensors that PyTorch keeps of each.

Legend: tokens of a micro-batch; widths in values.
"""

from __future__ import annotations

from dataclasses import dataclass

from nybble.plan import MemoryPlan
from nybble.planner.sizes import Sizes

MIB = 2**20
_FP32 = 4
_LOGITS_BYTES = 256 * MIB  # fp32 logits of a chunk: `nybble.models.loss.CHUNK_BYTES`


@dataclass(frozen=True)
class StockStep:
    sizes: Sizes
    plan: MemoryPlan
    tokens: int

    def training(self) -> dict[str, int]:
        """By category, at the peak of a micro-batch: in the loss where layers are kept, else in one layer backward."""
        kept = sum(layer.activations != "recompute" for layer in self.plan.layers)
        stream = self.tokens * self.sizes.model.hidden * self.sizes.value
        held = {"activations": kept * self._layer() + (len(self.plan.layers) - kept) * stream, "stream": 3 * stream}
        # Logits in the compute dtype and in fp32, their softmax and gradient; hidden states of targets, their gradient.
        loss = {"loss": 3 * self._logits() + 3 * stream}
        layer = {"recomputed": self._layer() if kept < len(self.plan.layers) else 0, **self._backward()}
        return held | max((loss, layer), key=lambda parts: sum(parts.values()))

    def evaluation(self) -> dict[str, int]:
        stream = self.tokens * self.sizes.model.hidden * self.sizes.value
        mlp = 3 * self.tokens * self.sizes.model.intermediate * self.sizes.value
        return {"stream": 4 * stream, "mlp": mlp, "materialized weights": self._weight(), "loss": 2 * self._logits()}

    def fragments(self, taken: int) -> int:
        """What the allocator reserves beyond: measured at 8B, where layers are recomputed, and SmolLM2, where kept."""
        recomputed = any(layer.activations == "recompute" for layer in self.plan.layers)
        return 360 * MIB + int(0.17 * taken) if recomputed else 200 * MIB + int(0.05 * taken)

    def _layer(self) -> int:
        """Norms keep their input in fp32 and their output; a gate, its activation, up and the product are all kept."""
        model, value = self.sizes.model, self.sizes.value
        attention = model.num_heads * model.head_dim
        heads = sum(linear.outputs for linear in model.projections[0])
        norms = model.norms * model.hidden * (_FP32 + value)
        narrow = sum(product.narrow for product in self.sizes.products)
        return self.tokens * (norms + (heads + attention + 4 * model.intermediate + narrow) * value)

    def _backward(self) -> dict[str, int]:
        gradients = self.tokens * (2 * self.sizes.model.hidden + self.sizes.model.intermediate) * self.sizes.value
        return {"activation gradients": gradients, "materialized weights": self._weight()}

    def _weight(self) -> int:
        """The largest linear's, in the compute dtype."""
        held_so = self.sizes.run.method == "lora" and self.sizes.run.storage_bytes == self.sizes.value
        held_so = held_so or self.sizes.run.method == "full"
        return 0 if held_so else max(linear.weights for linear in self.sizes.model.linears) * self.sizes.value

    def _logits(self) -> int:
        return min(_LOGITS_BYTES, self.tokens * self.sizes.model.vocabulary * _FP32)
