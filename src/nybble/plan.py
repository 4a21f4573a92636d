"""What a plan of memory is: a frozen value, made by arithmetic and carried out by others. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Activations = Literal["keep", "keep_matmuls", "keep_on_host", "recompute", "offload"]
Weights = Literal["resident", "streamed", "disk"]
Place = Literal["device", "host"]

# Of what is kept on the host: anything smaller is not worth a copy, and stays on the device.
LEAST_ON_HOST_BYTES = 64 * 1024


@dataclass(frozen=True)
class LayerPolicy:
    """How one decoder layer is held between its uses.

    activations: keep all that the backward pass reads; keep_matmuls all but what elementwise kernels make again from
    it; keep_on_host the same in host memory; recompute from the layer's input; offload that input to host memory and
    recompute from there.
    weights: resident on the device, streamed from pinned host memory, or from files on disk.
    """

    activations: Activations = "keep"
    weights: Weights = "resident"


@dataclass(frozen=True)
class MemoryPlan:
    """How a run holds what it needs. None of it changes what is computed, only where it lies and when it is made.

    layers: one policy each, in the model's order. span: layers that are recomputed together, from one input.
    keep_middle: offloading also keeps the stream after attention, which spares a product in the backward pass.
    mlp_rows: tokens that go through a recomputed layer's MLP at a time; None: all at once. embedding, head: where the
    16-bit matrices lie. moments: of the optimizer; paged ones lie in host memory whenever they are not needed.
    stream_slots: layers that the device holds of those streamed.
    """

    layers: tuple[LayerPolicy, ...]
    span: int = 1
    keep_middle: bool = True
    mlp_rows: int | None = None
    embedding: Place = "device"
    head: Place = "device"
    moments: Literal["resident", "paged"] = "resident"
    stream_slots: int = 2

    @classmethod
    def uniform(cls, num_layers: int, activations: Activations = "keep", weights: Weights = "resident") -> MemoryPlan:
        """The same policy for all layers, everything else on the device."""
        return cls((LayerPolicy(activations, weights),) * num_layers)

    def streamed(self) -> Sequence[int]:
        """The layers whose weights are not resident."""
        return [index for index, layer in enumerate(self.layers) if layer.weights != "resident"]
