"""How much each token weighs where a linear is rounded: the squared gradient, at its outputs, of a loss.

Errors at most tokens change no prediction, those at a few change many. A token weighs by how far a change of the
linear's output there would move the predictions (Fisher's information; GuidedQuant, arXiv 2505.07004): labels are drawn
from the 16-bit model's own predictions, their loss goes back through all layers, and the squares of its gradient are
summed over the outputs of all linears that share an input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial, reduce
from operator import add

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from nybble.calibrate.calls import behind_layers
from nybble.calibrate.head import Logits, gradient_at, rows_a_chunk
from nybble.calibrate.layer import Layer
from nybble.calibrate.states import Stream
from nybble.errors import UserError

# Times the mean, at most: the first token of a row may have a thousand times as much, and others would hardly count.
BOUND = 50.0


def draw_gradients(model: PreTrainedModel, logits: Logits, last: Stream, chance: torch.Generator) -> None:
    """Have `last` hold, for what the last layer gives, the gradient there of the loss of labels that are drawn.

    chance: on the stream's device.
    """
    loss, chunk_rows = partial(_drawn_loss, chance), rows_a_chunk(model)
    with behind_layers(model, last.at_once, last.length) as go_on:
        last.replace(lambda hidden: gradient_at(hidden, go_on, logits, loss, chunk_rows))


def pass_back(layer: Layer, stages: Sequence[Sequence[str]], given: Stream, gradients: Stream) -> dict[str, Tensor]:
    """Squared gradients, fp32 (batches, tokens of a batch), summed over the linears of a stage, by its first path.

    given: what comes to the layer. gradients: at what it gives; afterwards those at what comes to it. Where a linear
    gets other rows than the layer, as an expert does, its stage has none.
    """
    paths = [path for stage in stages for path in stage]
    squares: dict[str, list[Tensor]] = {path: [] for path in paths}
    inputs = given.on_device()

    def back(gradient: Tensor) -> Tensor:
        with torch.enable_grad():
            hidden = next(inputs).detach().requires_grad_()  # on a CPU it is the stream's own
            output = layer.call(layer.module, hidden)
        (found,) = torch.autograd.grad(output, hidden, gradient)
        return found

    with _squaring(layer.dense(paths), squares):
        gradients.replace(back)
    whole = [gradients.rows] * (len(gradients) // gradients.at_once)
    even = {path for path, found in squares.items() if [len(batch) for batch in found] == whole}
    # Added up in the order in which gradients come: the last linear's first.
    return {
        stage[0]: reduce(add, (torch.stack(squares[path]) for path in reversed(stage)))
        for stage in stages
        if even.issuperset(stage)
    }


def weights_of(squares: Tensor) -> Tensor:
    """How much each token weighs, bounded, 1 in the mean; raises UserError where squared gradients are not finite."""
    if not bool(torch.isfinite(squares).all()):
        fix = "Give another text, or take --rounding weighted, which needs none."
        raise UserError("gradients of the loss of its own predictions for the text are not finite", fix=fix)
    mean = squares.mean()
    if not mean > 0:
        return torch.ones_like(squares)
    bounded = (squares / mean).clamp(max=BOUND)
    return bounded / bounded.mean()


@contextlib.contextmanager
def _squaring(linears: Mapping[str, nn.Module], squares: Mapping[str, list[Tensor]]) -> Iterator[None]:
    """Inside, gradients at the outputs of `linears` add to `squares`, by path: those of each call, (tokens,)."""

    def watch(path: str, output: Tensor) -> None:
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: squares[path].append(gradient.float().square().sum(-1).flatten())
        )

    hooks = [
        linear.register_forward_hook(lambda _, __, output, path=path: watch(path, output))
        for path, linear in linears.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _drawn_loss(chance: torch.Generator, _: slice, logits: Tensor) -> Tensor:
    # The largest of p / e, e drawn from an exponential distribution, is each token with its p. What is drawn from
    # predictions that are not finite does not matter; `torch.multinomial` would end the process on a GPU.
    found = logits.detach().softmax(-1)
    labels = (found / torch.empty_like(found).exponential_(generator=chance)).argmax(-1)
    return cross_entropy(logits, labels, reduction="sum")
