"""How a model calls its decoder layers: recorded once, so that each layer can be called by itself afterwards.

What a layer is called with beside the hidden states (masks, rotary embeddings, positions) follows from the shape of
the batch alone, as all windows are of one length and begin at position 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nybble.models.attention import body_inputs
from nybble.models.device import compute_device
from nybble.models.skeleton import decoder_layers


@dataclass(frozen=True)
class LayerCall:
    """What one layer gets beside the hidden states (batch, length, hidden_size)."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        output = layer(hidden, *self.arguments, **self.keywords)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


class _Recorder(nn.Module):
    """Stands where a layer was: keeps what it is called with, and lets hidden states through."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.empty(0)
        self.call = LayerCall((), {})

    def forward(self, hidden: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        self.hidden = hidden
        self.call = LayerCall(arguments, keywords)
        return hidden


@torch.no_grad()
def record_calls(model: PreTrainedModel, windows: Tensor, batch_size: int) -> tuple[list[LayerCall], list[Tensor]]:
    """How the model calls each of its layers for a batch, and the hidden states that the first one gets, by batch.

    windows: (windows, length), a multiple of batch_size of them. Hidden states are on the CPU, in the compute dtype.
    The model's layers are not run, and may have their weights anywhere; so may the embedding.
    """
    layers = decoder_layers(model)
    recorders = [_Recorder() for _ in layers]
    for path, recorder in zip(layers, recorders, strict=True):
        model.set_submodule(path, recorder)
    try:
        hidden = []
        for batch in torch.split(windows, batch_size):
            _run_body(model, batch)
            hidden.append(recorders[0].hidden.cpu())
    finally:
        for path, layer in layers.items():
            model.set_submodule(path, layer)
    return [recorder.call for recorder in recorders], hidden


def _run_body(model: PreTrainedModel, batch: Tensor) -> None:
    device = compute_device(model)
    embedding = model.get_input_embeddings()
    embedded = embedding(batch.to(embedding.weight.device)).to(device)
    positions = torch.arange(batch.shape[1], device=device).expand(batch.shape)
    inputs = body_inputs(model.config, batch.to(device), positions)
    del inputs["input_ids"]
    model.base_model(inputs_embeds=embedded, **inputs)
