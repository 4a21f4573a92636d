"""Held-out loss: a mean over tokens, whatever the batches, that leaves no trace."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from nybble.config import RunConfig
from nybble.train.course import evaluation_batches
from nybble.train.evaluate import evaluate
from tests.train.test_loop import loss_and_data


def test_it_is_exact_over_tokens(settings: Callable[..., RunConfig]) -> None:
    loss, examples = loss_and_data(settings("gemma2"), fp64=True)
    one_by_one = [evaluate(loss, evaluation_batches([example], 1)) for example in examples]
    tokens = sum(result.target_tokens for result in one_by_one)
    mean = sum(result.loss * result.target_tokens for result in one_by_one) / tokens
    assert len({result.target_tokens for result in one_by_one}) > 1
    for batch_size in (5, 24):
        result = evaluate(loss, evaluation_batches(examples, batch_size))
        assert result.target_tokens == tokens
        assert result.loss == pytest.approx(mean, rel=1e-12)


def test_it_leaves_no_trace(settings: Callable[..., RunConfig]) -> None:
    loss, examples = loss_and_data(settings(**{"lora.lora_dropout": 0.5}))
    loss.train()
    loss.model.lm_head.eval()
    modes = [module.training for module in loss.modules()]
    torch.manual_seed(5)
    drawn = torch.rand(2)
    torch.manual_seed(5)
    first = evaluate(loss, evaluation_batches(examples, 4))
    assert torch.equal(torch.rand(2), drawn)
    assert evaluate(loss, evaluation_batches(examples, 4)) == first  # no dropout
    assert modes == [module.training for module in loss.modules()]
    assert all(parameter.grad is None for parameter in loss.parameters())


def test_nothing_to_evaluate() -> None:
    assert math.isnan(evaluate(torch.nn.Linear(1, 1), []).loss)
