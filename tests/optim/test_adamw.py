"""Which parameters are updated, and which of them decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nybble.errors import UserError
from nybble.optim.adamw import build_optimizer
from nybble.optim.config import OptimConfig


class Small(nn.Module):
    """A matrix, a bias, a norm, a magnitude as DoRA has it, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)
        self.magnitude = nn.Parameter(torch.ones(3))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)


def test_only_matrices_decay_and_frozen_parameters_are_left_out() -> None:
    module = Small()
    optimizer = build_optimizer(module, OptimConfig(weight_decay=0.1))
    decayed, plain = optimizer.param_groups
    assert [id(p) for p in decayed["params"]] == [id(module.linear.weight)]
    expected = [module.magnitude, module.linear.bias, module.norm.weight, module.norm.bias]
    assert {id(p) for p in plain["params"]} == {id(p) for p in expected}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


def test_one_update_is_the_papers_formula() -> None:
    """Loshchilov and Hutter, 2019, algorithm 2: at first lr * sign(g), beside the decay."""
    module = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        module.weight.fill_(2.0)
    module.weight.grad = torch.full_like(module.weight, -3.0)
    build_optimizer(module, OptimConfig(learning_rate=0.01, weight_decay=0.1, eps=1e-8)).step()
    assert module.weight.item() == pytest.approx(2.0 * (1 - 0.01 * 0.1) + 0.01 * 3 / (3 + 1e-8), abs=1e-15)


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(UserError, match="nothing to train"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), OptimConfig())
