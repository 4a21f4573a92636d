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
        recomputed = len(self.plan.layers) - kept
        held = {"activations": kept * self._layer() + recomputed * stream, "stream": 3 * stream}
        if self._casts:
            held["cast weights"] = kept * self._casts
        # Logits in the compute dtype and in fp32, their softmax and gradient; hidden states of targets, their gradient.
        loss = {"loss": 3 * self._logits() + 3 * stream, **self._trained_head()}
        layer = {"recomputed": self._layer() + self._casts if recomputed else 0, **self._backward()}
        return held | max((loss, layer), key=lambda parts: sum(parts.values()))

    def evaluation(self) -> dict[str, int]:
        stream = self.tokens * self.sizes.model.hidden * self.sizes.value
        mlp = 3 * self.tokens * self.sizes.model.intermediate * self.sizes.value
        return {"stream": 4 * stream, "mlp": mlp, "materialized weights": self._weight(), "loss": 2 * self._logits()}

    def fragments(self, taken: int) -> int:
        """What the allocator reserves beyond: measured at 8B, 2 x 2048 tokens, either way on an H200."""
        recomputed = any(layer.activations == "recompute" for layer in self.plan.layers)
        return 200 * MIB + int((0.04 if recomputed else 0.09) * taken)

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

    @property
    def _is_cast(self) -> bool:
        """Whether weights are held otherwise than they are multiplied."""
        return self.sizes.run.method == "qlora" or self.sizes.run.storage_bytes != self.sizes.value

    @property
    def _casts(self) -> int:
        """Of a layer, the weights in training as they are multiplied: PyTorch keeps them for the backward pass."""
        in_training = self.sizes.run.method == "full" and self._is_cast
        return self.sizes.model.linear_weights * self.sizes.value if in_training else 0

    def _weight(self) -> int:
        """The largest linear's, as it is multiplied; of one in training its gradient, so and as it is added."""
        largest, value = max(linear.weights for linear in self.sizes.model.linears), self.sizes.value
        if self.sizes.run.method == "full":
            return largest * (value + self.sizes.run.storage_bytes * self._is_cast)
        return largest * value * self._is_cast

    def _trained_head(self) -> dict[str, int]:
        """As it is multiplied, and in fp32 its gradient of one chunk of logits, and of those before."""
        if self.sizes.run.method != "full":
            return {}
        gradients = 1 if self._logits() < _LOGITS_BYTES else 2
        return {"head": self.sizes.model.embedding_weights * (self.sizes.value * self._is_cast + gradients * _FP32)}

    def _logits(self) -> int:
        return min(_LOGITS_BYTES, self.tokens * self.sizes.model.vocabulary * _FP32)
