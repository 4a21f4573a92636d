"""How a model calls its decoder layers, and goes on behind them: each layer can then be called by itself.

What a layer is called with beside the hidden states (masks, rotary embeddings, positions) is the same for all batches
of as many windows, as they are of one length and begin at position 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
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
    """What one layer gets beside the hidden states (windows, length, hidden_size) of a batch."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        output = layer(hidden, *self.arguments, **self.keywords)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


class _Recorder(nn.Module):
    """Stands where a layer was: keeps what it is called with, and lets hidden states through or gives others."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.empty(0)
        self.call = LayerCall((), {})
        self.given: Tensor | None = None
        self.as_tuple = False  # as layers of some models give it

    def forward(self, hidden: Tensor, *arguments: Any, **keywords: Any) -> Tensor | tuple[Tensor]:
        self.hidden = hidden
        self.call = LayerCall(arguments, keywords)
        given = hidden if self.given is None else self.given
        return (given,) if self.as_tuple else given


@torch.no_grad()
def record_calls(model: PreTrainedModel, windows: Tensor, *, at_once: int = 1) -> tuple[list[LayerCall], list[Tensor]]:
    """How the model calls each of its layers for `at_once` windows, and what the first one gets, a batch of so many.

    windows: (windows, length), a multiple of `at_once`. Hidden states are (at_once, length, hidden_size), on the CPU,
    in the compute dtype. The model's layers are not run, and may have their weights anywhere; so may the embedding.
    """
    with without_layers(model) as recorders:
        hidden = []
        for batch in torch.split(windows, at_once):
            _run_body(model, batch)
            hidden.append(recorders[0].hidden.cpu())
        return [recorder.call for recorder in recorders], hidden


@contextlib.contextmanager
def behind_layers(model: PreTrainedModel, windows: int, length: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """Inside, the model has no layers, and a function gives its last hidden states for what the last layer gives.

    Both are (windows, length, hidden_size), on the model's device.
    """
    with without_layers(model) as recorders:
        last, tokens = recorders[-1], torch.zeros(windows, length, dtype=torch.int64)

        def go_on(hidden: Tensor) -> Tensor:
            last.given = hidden
            try:
                return _run_body(model, tokens)
            finally:
                last.given = None

        yield go_on


@contextlib.contextmanager
def without_layers(model: PreTrainedModel) -> Iterator[list[_Recorder]]:
    """Inside, recorders stand where the layers were, and hidden states go through as they are."""
    layers = decoder_layers(model)
    recorders = [_Recorder() for _ in layers]
    for path, recorder in zip(layers, recorders, strict=True):
        model.set_submodule(path, recorder)
    try:
        takes_tuples = _takes_tuples(model)
        for recorder in recorders:
            recorder.as_tuple = takes_tuples
        yield recorders
    finally:
        for path, layer in layers.items():
            model.set_submodule(path, layer)


def _takes_tuples(model: PreTrainedModel) -> bool:
    """Whether the model, which has recorders for layers, takes the first part of what a layer gives."""
    try:
        return _run_body(model, torch.zeros(1, 2, dtype=torch.int64)).dim() < 3
    except (IndexError, RuntimeError):  # at the next layer, or behind the last
        return True


def _run_body(model: PreTrainedModel, window: Tensor) -> Tensor:
    device = compute_device(model)
    embedding = model.get_input_embeddings()
    embedded = embedding(window.to(embedding.weight.device)).to(device)
    positions = torch.arange(window.shape[1], device=device).expand(window.shape)
    inputs = body_inputs(model.config, window.to(device), positions)
    del inputs["input_ids"]
    hidden: Tensor = model.base_model(inputs_embeds=embedded, **inputs).last_hidden_state
    return hidden
