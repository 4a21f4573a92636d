"""The scales of all layers, trained together so that the quantized model predicts what the 16-bit model does.

A layer that is quantized by itself comes as near as it can to its own outputs; what counts is what all of them make of
a text. Codes stay, and one value for 64 weights is trained, by how far the two models' predictions diverge at every
token (scales of uniform codes, by a task's loss: the second phase of EfficientQAT, arXiv 2407.11062). Held are all
layers in NF4, their scales' moments, and one window's states between layers: each is run again for its gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel

from nybble.calibrate.calls import behind_layers
from nybble.calibrate.layer import Layer
from nybble.calibrate.states import Stream
from nybble.models.logits import find_logit_rule
from nybble.quant.linear import DenseLinear

PASSES = 2  # over all windows, one a step
LEARNING_RATE = 2e-3  # of Adam: by so much of itself a scale moves in a step at most, at first
_BETAS = (0.9, 0.99)
_WARM_UP = 8  # steps
_CHUNK_BYTES = 128 * 2**20  # fp32 logits of one chunk of a window; five times as much is held

Logits = Callable[[Tensor], Tensor]


def tuning_steps(windows: int) -> int:
    return PASSES * windows


def tune_scales(
    model: PreTrainedModel, layers: Sequence[Layer], given: Stream, wanted: Stream, *, done: Callable[[], None]
) -> None:
    """Train the scales of all linears that `Layer.tune_` has put into `layers`, on the model's device.

    given: what comes to the first layer; wanted: what the last one of the 16-bit model gives; window by window.
    done: called after each of `tuning_steps`.
    """
    linears = [linear for layer in layers for linear in layer.tuned().values()]
    optimizer = torch.optim.Adam([linear.change for linear in linears], betas=_BETAS)
    total = tuning_steps(len(given))
    with behind_layers(model, given.length) as go_on:
        diverge = partial(_divergence, go_on, _logits_of(model), _rows_a_chunk(model))
        order = _order(len(given))
        pairs = zip(given.on_device(order), wanted.on_device(order), strict=True)
        for step, (hidden, target) in enumerate(pairs):
            for group in optimizer.param_groups:
                group["lr"] = _rate(step, total)
            _add_gradients(layers, hidden, partial(diverge, target))
            for linear in linears:
                linear.pass_gradient()
            optimizer.step()
            for linear in linears:
                linear.follow()
            done()


def tuning_bytes(layers: Iterable[Sequence[DenseLinear]], states_bytes: int, block_size: int) -> int:
    """About what `tune_scales` takes of a device beside the model's embedding and head.

    layers: their linears. states_bytes: of one window's hidden states.
    """
    weights = [sum(linear.weight.numel() for linear in linears) for linears in layers]
    # Codes; a scale as it was and is, its change, the gradient and two moments. A layer that is run again: levels and a
    # product in fp32, the weight in 16 bits and its gradient; of its activations about 40 times what comes to it.
    held = sum(weights) * (0.5 + 6 * 4 / block_size) + max(weights, default=0) * 12
    return int(held) + (len(weights) + 40) * states_bytes + 5 * _CHUNK_BYTES


def _order(windows: int) -> list[int]:
    """The window of each step: every pass shuffles them, as texts often go from one subject to the next."""
    chance = torch.Generator().manual_seed(0)
    return [index for _ in range(PASSES) for index in torch.randperm(windows, generator=chance).tolist()]


def _rate(step: int, total: int) -> float:
    """Of the step, counted from 0: from little to `LEARNING_RATE` and along a cosine to 0."""
    return LEARNING_RATE * min(1.0, (step + 1) / _WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * step / total))


def _add_gradients(layers: Sequence[Layer], hidden: Tensor, diverge: Callable[[Tensor], Tensor]) -> None:
    """diverge: the gradient at what the last layer gives, for that."""
    given = []
    for layer in layers:
        given.append(hidden)
        hidden = layer.call(layer.module, hidden)
    gradient = diverge(hidden)
    for layer in reversed(layers):
        with torch.enable_grad():
            inputs = given.pop().requires_grad_()
            outputs = layer.call(layer.module, inputs)
        torch.autograd.backward(outputs, gradient)
        assert inputs.grad is not None
        gradient = inputs.grad


def _divergence(
    go_on: Callable[[Tensor], Tensor], logits: Logits, rows_a_chunk: int, target: Tensor, hidden: Tensor
) -> Tensor:
    """The gradient, at `hidden`, of how far its predictions are from `target`'s (Kullback and Leibler's divergence).

    Both are what the last layer gives. Summed over tokens, for what little one of many has would vanish in fp16.
    """
    wanted = go_on(target).flatten(0, 1)
    with torch.enable_grad():
        given = hidden.detach().requires_grad_()
        rows = go_on(given).flatten(0, 1)
    gradient = torch.empty_like(rows)
    for start in range(0, len(rows), rows_a_chunk):
        chunk = slice(start, start + rows_a_chunk)
        expected = log_softmax(logits(wanted[chunk]), dim=-1)
        with torch.enable_grad():
            part = rows[chunk].detach().requires_grad_()
            found = log_softmax(logits(part), dim=-1)
            divergence = kl_div(found, expected, reduction="sum", log_target=True)
        (gradient[chunk],) = torch.autograd.grad(divergence, part)
    (at_hidden,) = torch.autograd.grad(rows, given, gradient)
    return at_hidden


def _logits_of(model: PreTrainedModel) -> Logits:
    """The model's head, from its last hidden states on."""
    rule, head = find_logit_rule(model), model.get_output_embeddings()
    return lambda rows: rule(head(rows))


def _rows_a_chunk(model: PreTrainedModel) -> int:
    vocabulary: int = model.config.get_text_config().vocab_size
    return max(1, _CHUNK_BYTES // (4 * vocabulary))
