"""What autograd saves, in pinned host memory between the passes."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from nybble.memory import saved
from nybble.memory.saved import SavedOnHost
from tests.planner.live import LiveBytes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def little_is_kept_on_the_host_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "LEAST_ON_HOST_BYTES", 64)


def layer(x: Tensor, weight: Tensor) -> Tensor:
    """Saves products, a view of one, one of them twice, and a number that is too small to go."""
    product = x @ weight
    return (product.t() * product.tanh().t() * product[0, 0].cos()).t().contiguous()


def gradients(x: Tensor, weights: list[Tensor], home: SavedOnHost | None) -> list[Tensor]:
    x = x.clone().requires_grad_()
    weights = [weight.clone().requires_grad_() for weight in weights]
    y = x
    if home is not None:
        home.begin()
    for weight in weights:
        if home is None:
            y = layer(y, weight)
        else:
            with home.saving(len(x)):
                y = layer(y, weight)
    y.sum().backward()
    return [tensor.grad for tensor in (x, *weights) if tensor.grad is not None]


def test_gradients_are_those_of_what_stayed() -> None:
    home = SavedOnHost(CPU)
    for rows in (8, 12, 8):
        x, *weights = (torch.randn(rows, 8) if not i else torch.randn(8, 8) for i in range(4))
        found, expected = gradients(x, weights, home), gradients(x, weights, None)
        assert len(found) == 4
        assert all(map(torch.equal, found, expected))


def test_memory_that_is_saved_twice_goes_once() -> None:
    home = SavedOnHost(CPU)
    x = torch.randn(8, 8, requires_grad=True)
    home.begin()
    with home.saving(8):
        y = x * 1.0
        _ = y.exp() * y.t()
    assert len(home.layers[0].saved) == 2  # y and its exponential
    assert home.host_bytes == 2 * x.nbytes


def test_what_is_little_stays() -> None:
    home = SavedOnHost(CPU)
    x = torch.randn(15, requires_grad=True)
    home.begin()
    with home.saving(8):
        (x.exp() * x.sin()).sum().backward()
    assert home.host_bytes == 0


def test_what_an_earlier_pass_saved_is_gone() -> None:
    home = SavedOnHost(CPU)
    x = torch.randn(8, 8, requires_grad=True)
    home.begin()
    with home.saving(8):
        y = x.exp()
    home.begin()
    with pytest.raises(RuntimeError, match="another forward pass"):
        y.sum().backward()


def test_memory_is_pinned_for_the_most_tokens_at_once() -> None:
    home, given = SavedOnHost(CPU, most_tokens=32), []
    for rows in (8, 16, 32, 8):
        x, *weights = (torch.randn(rows, 8), torch.randn(8, 8), torch.randn(8, 8))
        gradients(x, weights, home)
        given.append(home.host_bytes)
    assert len(set(given)) == 1
    exact = SavedOnHost(CPU)
    gradients(torch.randn(32, 8), weights, exact)
    weights_bytes = 2 * 8 * 8 * 4  # which x @ weight saves too, whatever the length
    assert given[0] - 4 * weights_bytes == exact.host_bytes - weights_bytes


def test_layers_that_save_other_numbers_of_tensors() -> None:
    home = SavedOnHost(CPU)
    x = torch.randn(8, 8, requires_grad=True)
    for depths in ((1, 4, 2), (3, 1, 1), (2, 2, 5)):
        found = []
        for store in (home, None):
            y = x
            home.begin()
            for depth in depths:
                if store is None:
                    y = deep(y, depth)
                else:
                    with store.saving(8):
                        y = deep(y, depth)
            found.append(torch.autograd.grad(y.sum(), x)[0])
        assert torch.equal(*found)


def test_what_the_next_layer_has_no_counterpart_of_is_let_go_with_the_one_behind() -> None:
    home = SavedOnHost(CPU)
    y = torch.randn(8, 8, requires_grad=True)
    home.begin()
    for depth, still_held in ((3, 3), (1, 2), (1, 0)):
        with home.saving(8):
            y = deep(y, depth)
        assert sum(away.held is not None for away in home.layers[0].saved) == still_held


def deep(x: Tensor, depth: int) -> Tensor:
    for _ in range(depth):
        x = x.tanh()
    return x


def test_what_was_saved_before_comes_back_ahead_of_its_use() -> None:
    home = SavedOnHost(CPU)
    x = torch.randn(8, 8, requires_grad=True)
    home.begin()
    y, seen = x, []
    for _ in range(2):
        with home.saving(8):
            y = deep(y, 2)
        y.register_hook(lambda _: seen.append(under_way(home)))
    assert [[away.held is not None for away in layer.saved] for layer in home.layers] == [[False, False], [True, True]]
    y.sum().backward()
    assert seen == [0, 2]  # before the last layer nothing; behind it all of the first


def under_way(home: SavedOnHost) -> int:
    return sum(away.coming is not None for away in home.layers[0].saved)


def test_a_pass_without_a_backward_pass_leaves_nothing() -> None:
    """Small outputs that their own nodes save would hold the graph, and all that is saved in it."""
    home, live = SavedOnHost(CPU), LiveBytes()
    with live:
        for _ in range(3):
            home.begin()
            with home.saving(8):
                y = torch.randn(8, 8, requires_grad=True).exp()
                y = y * y.sum().exp()  # whose output is small
    assert live.held
    del y
    home.begin()
    gc.collect()
    assert live.held == 0
