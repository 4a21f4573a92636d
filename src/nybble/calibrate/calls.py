"""How a model calls its decoder layers: recorded once, so that each layer can be called by itself afterwards.

What a layer is called with beside the hidden states (masks, rotary embeddings, positions) is the same for all windows,
as they are of one length and begin at position 0.
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
    """What one layer gets beside the hidden states (1, length, hidden_size) of a window."""

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
def record_calls(model: PreTrainedModel, windows: Tensor) -> tuple[list[LayerCall], list[Tensor]]:
    """How the model calls each of its layers for a window, and the hidden states that the first one gets, by window.

    windows: (windows, length). Hidden states are (1, length, hidden_size), on the CPU, in the compute dtype.
    The model's layers are not run, and may have their weights anywhere; so may the embedding.
    """
    layers = decoder_layers(model)
    recorders = [_Recorder() for _ in layers]
    for path, recorder in zip(layers, recorders, strict=True):
        model.set_submodule(path, recorder)
    try:
        hidden = []
        for window in torch.split(windows, 1):
            _run_body(model, window)
            hidden.append(recorders[0].hidden.cpu())
    finally:
        for path, layer in layers.items():
            model.set_submodule(path, layer)
    return [recorder.call for recorder in recorders], hidden


def _run_body(model: PreTrainedModel, window: Tensor) -> None:
    device = compute_device(model)
    embedding = model.get_input_embeddings()
    embedded = embedding(window.to(embedding.weight.device)).to(device)
    positions = torch.arange(window.shape[1], device=device).expand(window.shape)
    inputs = body_inputs(model.config, window.to(device), positions)
    del inputs["input_ids"]
    model.base_model(inputs_embeds=embedded, **inputs)
