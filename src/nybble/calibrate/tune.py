"""The scales of all layers, trained together so that a quantized model predicts what the 16-bit one does.

A layer that is quantized by itself comes as near as it can to its own outputs; what counts is what all of them make of
a text. Codes stay, and one value for 64 weights is trained, by how far the two models' predictions diverge at every
token (scales of uniform codes, by a task's loss: the second phase of EfficientQAT, arXiv 2407.11062). Held are all
layers, their linears in NF4, the scales with their moments, and one step's states between layers: each is run again for
its gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel

from nybble.calibrate.calls import behind_layers
from nybble.calibrate.head import CHUNK_BYTES, Logits, gradient_at, rows_a_chunk
from nybble.calibrate.layer import Layer
from nybble.calibrate.states import Stream
from nybble.errors import UserError
from nybble.quant.linear import DenseLinear

PASSES = 2  # over all windows
STEP_TOKENS = 2048
SCALE_RATE = 2e-3  # of Adam: by about so much of itself a scale moves in a step, at first
_BETAS = (0.9, 0.99)
_WARM_UP = 8  # steps


@dataclass(frozen=True)
class Tuning:
    """A model whose layers are elsewhere, and a text by window: what comes to the first layer, and what is to come.

    logits: `logits_of` the model. wanted: what the last layer of the 16-bit model gives. at_once: windows of a step, of
    which there are a multiple.
    """

    model: PreTrainedModel
    logits: Logits
    given: Stream
    wanted: Stream
    at_once: int

    @property
    def steps(self) -> int:
        return PASSES * len(self.given) // self.at_once

    def scales(self, layers: Sequence[Layer], done: Callable[[], None]) -> None:
        """Train the `TunedScales` of `layers`. done: called after each step."""
        linears = [linear for layer in layers for linear in layer.tuned().values()]
        # In one kernel: otherwise it holds as much again as its moments.
        optimizer = torch.optim.Adam([linear.change for linear in linears], betas=_BETAS, fused=True)
        for share in self._gradients(layers):
            for linear in linears:
                linear.pass_gradient()
            for group in optimizer.param_groups:
                group["lr"] = SCALE_RATE * share
            optimizer.step()
            optimizer.zero_grad()
            for linear in linears:
                linear.follow()
            done()
        _require_finite(linear.change for linear in linears)

    def _gradients(self, layers: Sequence[Layer]) -> Iterator[float]:
        """For each step the share of the full rate, when the gradients are there."""
        steps = _order(len(self.given), self.at_once)
        pairs = zip(self.given.windows(steps), self.wanted.windows(steps), strict=True)
        with behind_layers(self.model, self.at_once, self.given.length) as go_on:
            diverge = partial(_divergence, go_on, self.logits, rows_a_chunk(self.model))
            for step, (hidden, target) in enumerate(pairs):
                _require_finite([_add_gradients(layers, hidden, partial(diverge, target))])
                yield _share(step, self.steps)


def tuning_bytes(
    layers: Iterable[tuple[nn.Module, Iterable[DenseLinear]]], *, states_bytes: int, block_size: int
) -> int:
    """About what a `Tuning` takes of a device beside the model's embedding and head.

    layers: with their linears that are to be quantized. states_bytes: of one step's hidden states.
    """
    weights, kept_bytes = [], 0
    for layer, linears in layers:
        quantized = [linear.weight for linear in linears]
        weights.append(sum(weight.numel() for weight in quantized))
        kept_bytes += sum(tensor.nbytes for tensor in chain(layer.parameters(), layer.buffers()))
        kept_bytes -= sum(weight.nbytes for weight in quantized)
    # Codes; a scale as it was and is, its change, the gradient and two moments. A layer that is run again: levels and a
    # product in fp32, the weight in 16 bits and its gradient; of its activations about 40 times what comes to it.
    held = sum(weights) * (0.5 + 6 * 4 / block_size) + max(weights, default=0) * 12
    return int(held) + kept_bytes + (len(weights) + 40) * states_bytes + 5 * CHUNK_BYTES


def _order(windows: int, at_once: int) -> list[list[int]]:
    """The windows of each step: every pass shuffles them, as texts often go from one subject to the next."""
    chance = torch.Generator().manual_seed(0)
    passes = [torch.randperm(windows, generator=chance).view(-1, at_once) for _ in range(PASSES)]
    found: list[list[int]] = torch.cat(passes).tolist()
    return found


def _share(step: int, total: int) -> float:
    """Of the full rate at a step, counted from 0: from little to 1 and along a cosine to 0."""
    return min(1.0, (step + 1) / _WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * step / total))


def _require_finite(trained: Iterable[Tensor]) -> None:
    if not all(bool(torch.isfinite(part).all()) for part in trained):
        fix = "Give another text, or take --rounding weighted, which trains nothing."
        raise UserError("its predictions for the text, or their gradients, are not finite: they tune nothing", fix=fix)


def _add_gradients(layers: Sequence[Layer], hidden: Tensor, diverge: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradient at `hidden`, which comes to the first layer. diverge: that at what the last one gives, for that."""
    given = []
    for layer in layers:
        given.append(hidden)
        hidden = layer.call(layer.module, hidden)
    gradient = diverge(hidden)
    for layer in reversed(layers):
        with torch.enable_grad():
            inputs = given.pop().detach().requires_grad_()
            outputs = layer.call(layer.module, inputs)
        torch.autograd.backward(outputs, gradient)
        assert inputs.grad is not None
        gradient = inputs.grad
    return gradient


def _divergence(
    go_on: Callable[[Tensor], Tensor], logits: Logits, chunk_rows: int, target: Tensor, hidden: Tensor
) -> Tensor:
    """The gradient, at `hidden`, of how far its predictions are from `target`'s (Kullback and Leibler's divergence).

    Both are what the last layer gives. Summed over tokens, for what little one of many has would vanish in fp16.
    """
    wanted = go_on(target).flatten(0, 1)

    def divergence(chunk: slice, found: Tensor) -> Tensor:
        expected = log_softmax(logits(wanted[chunk]), dim=-1)
        return kl_div(log_softmax(found, dim=-1), expected, reduction="sum", log_target=True)

    return gradient_at(hidden, go_on, logits, divergence, chunk_rows)
