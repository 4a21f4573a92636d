"""What autograd saves, in pinned host memory between the passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble.memory import saved
from nybble.memory.saved import SavedOnHost

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
            with home.saving():
                y = layer(y, weight)
    y.sum().backward()
    return [tensor.grad for tensor in (x, *weights) if tensor.grad is not None]


def test_gradients_are_those_of_what_stayed() -> None:
    home = SavedOnHost(3, CPU)
    for rows in (8, 12, 8):
        x, *weights = (torch.randn(rows, 8) if not i else torch.randn(8, 8) for i in range(4))
        found, expected = gradients(x, weights, home), gradients(x, weights, None)
        assert len(found) == 4
        assert all(map(torch.equal, found, expected))


def test_memory_that_is_saved_twice_goes_once() -> None:
    home = SavedOnHost(1, CPU)
    x = torch.randn(8, 8, requires_grad=True)
    home.begin()
    with home.saving():
        y = x * 1.0
        _ = y.exp() * y.t()
    assert sum(len(store.tickets) for store in home.stores) == 2  # y and its exponential
    assert home.host_bytes == 2 * x.nbytes


def test_what_is_little_stays() -> None:
    home = SavedOnHost(1, CPU)
    x = torch.randn(15, requires_grad=True)
    home.begin()
    with home.saving():
        (x.exp() * x.sin()).sum().backward()
    assert not home.stores


def test_what_an_earlier_pass_saved_is_gone() -> None:
    home = SavedOnHost(1, CPU)
    x = torch.randn(8, 8, requires_grad=True)
    home.begin()
    with home.saving():
        y = x.exp()
    home.begin()
    with pytest.raises(RuntimeError, match="another forward pass"):
        y.sum().backward()
