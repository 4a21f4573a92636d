"""How much tokens weigh: gradients at the outputs of linears, of labels as the model predicts them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nybble.calibrate.calls import LayerCall, behind_layers, record_calls
from nybble.calibrate.head import logits_of
from nybble.calibrate.layer import Layer, find_stages
from nybble.calibrate.sensitivity import BOUND, draw_gradients, pass_back, weights_of
from nybble.calibrate.states import Stream
from nybble.errors import UserError
from nybble.models.config import ModelConfig
from nybble.models.load import load_model
from nybble.models.skeleton import decoder_layers
from nybble.quant.linear import DenseLinear

Tiny = Callable[..., Path]

CPU = torch.device("cpu")


def loaded_layers(folder: Path, windows: Tensor, at_once: int) -> tuple[nn.Module, list[Layer], Stream]:
    model = load_model(ModelConfig(name=str(folder)), device=CPU, storage="fp32").model
    calls, hidden = record_calls(model, windows, at_once=at_once)
    held = decoder_layers(model).items()
    return model, [Layer(*part, call) for part, call in zip(held, calls, strict=True)], Stream(hidden, CPU)


def random_tokens(windows: int, length: int) -> Tensor:
    return torch.randint(4, 40, (windows, length), generator=torch.Generator().manual_seed(0))


def test_squares_are_of_the_gradients_at_the_outputs(tiny: Tiny) -> None:
    """Of all linears that share an input, and back through layers one by one."""
    windows = random_tokens(4, 6)
    model, layers, given = loaded_layers(tiny("llama"), windows, 2)
    expected: dict[str, list[Tensor]] = {}

    def watch(path: str) -> Callable[..., None]:
        def keep(gradient: Tensor) -> None:
            expected.setdefault(path, []).append(gradient.square().sum(-1).flatten())

        return lambda _, __, output: output.register_hook(keep) and None

    hooks = [
        model.get_submodule(path).register_forward_hook(watch(path)) for path in layers[0].dense() | layers[1].dense()
    ]
    loss_at = torch.randn(4, 6, given._batches[0].shape[-1], generator=torch.Generator().manual_seed(1))
    at_input = []
    for batch, weight in zip(given.on_device(), loss_at.split(2), strict=True):
        hidden = batch.detach().requires_grad_()
        output = layers[1].call(layers[1].module, layers[0].call(layers[0].module, hidden))
        at_input.append(torch.autograd.grad((output * weight).sum(), hidden)[0])
    for hook in hooks:
        hook.remove()

    gradients, squares = Stream(loss_at.split(2), CPU), {}
    with torch.no_grad():
        behind = given.behind(layers[0])
        for layer, before in ((layers[1], behind), (layers[0], given)):
            stages = find_stages(layer.dense(), partial(layer.call, layer.module, next(before.on_device())))
            for stage, found in zip(stages, pass_back(layer, stages, before, gradients).items(), strict=True):
                assert found[0] == stage[0]
                squares[tuple(stage)] = found[1]
    assert len(squares) == 8
    for stage, found in squares.items():
        wanted = sum(torch.stack(expected[path]) for path in stage)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6, msg=str(stage))
    torch.testing.assert_close(torch.cat(list(gradients.on_device())), torch.cat(at_input), rtol=1e-3, atol=1e-5)


class _SomeTokens(nn.Module):
    """A layer with a linear for all tokens, one for those that come first, and one for none."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("whole", "expert", "idle"):
            self.add_module(name, DenseLinear.from_weight(torch.randn(8, 8), None, torch.float32))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.get_submodule("whole")(hidden) + self.get_submodule("expert")(hidden[:, :2]).sum()


def test_linears_that_do_not_get_all_tokens_weigh_none() -> None:
    layer = Layer("l", _SomeTokens(), LayerCall((), {}))
    given, gradients = (Stream(torch.randn(4, 5, 8).split(2), CPU) for _ in range(2))
    with torch.no_grad():
        squares = pass_back(layer, [["l.whole"], ["l.expert"], ["l.idle"]], given, gradients)
    assert {stage: found.shape for stage, found in squares.items()} == {"l.whole": (2, 10)}


@torch.no_grad()
def test_labels_are_drawn_as_the_model_predicts(tiny: Tiny) -> None:
    """Then the mean gradient is none, as labels that are the likeliest, or all alike, would not have it."""
    windows = random_tokens(1, 6).repeat(512, 1)
    model, layers, states = loaded_layers(tiny("llama"), windows, 128)
    # Sharper than a random model's, so that labels are not nearly alike.
    model.get_output_embeddings().weight.data.mul_(3)
    predictions = logits_of(model)
    for layer in layers:
        states.advance(layer)
    with behind_layers(model, 128, 6) as go_on:
        chances = predictions(go_on(next(states.on_device()))[:1]).softmax(-1)
    assert 0.02 < chances.max(-1).values.mean() < 0.9
    draw_gradients(model, predictions, states, torch.Generator().manual_seed(0))
    gradients = torch.cat(list(states.on_device()))
    sizes = gradients.square().sum(-1).mean(0).sqrt()
    means = gradients.mean(0).square().sum(-1).sqrt()
    assert (sizes > 0).all()
    assert (means < 0.15 * sizes).all()  # of 512: 0.04


def test_weights_are_one_in_the_mean_and_bounded() -> None:
    squares = torch.rand(4, 500)
    torch.testing.assert_close(weights_of(squares), squares / squares.mean())
    squares[0, 0] = 1e6
    found = weights_of(squares)
    torch.testing.assert_close(found.mean(), torch.tensor(1.0))
    assert found[0, 0] == found.max()
    bounded = (squares / squares.mean()).clamp(max=BOUND)
    torch.testing.assert_close(found, bounded / bounded.mean())
    assert torch.equal(weights_of(torch.zeros(2, 3)), torch.ones(2, 3))


def test_gradients_that_are_not_finite_are_told() -> None:
    with pytest.raises(UserError, match="not finite"):
        weights_of(torch.tensor([[1.0, float("nan")]]))
