"""Activation checkpointing computes the layers twice and gives the same gradients to the bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nybble.config import RunConfig
from nybble.train.activation_checkpointing import enable_activation_checkpointing
from nybble.train.course import Course, training_batches
from tests.train.test_loop import loss_and_data


def gradients(config: RunConfig, *, recompute: bool) -> tuple[dict[str, Tensor], int]:
    """The gradients of one micro-batch, and how often the last layer's MLP ran for them."""
    loss, examples = loss_and_data(config)
    if recompute:
        enable_activation_checkpointing(loss.model)
    layers = next(m for m in loss.model.modules() if isinstance(m, torch.nn.ModuleList))
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    layers[-1].mlp.register_forward_pre_hook(count)
    batch = next(training_batches(examples, config.train, Course.plan(len(examples), config.train)))
    torch.manual_seed(0)
    loss.train()
    loss(batch.input_ids, batch.labels, batch.position_ids).backward()
    return {name: p.grad for name, p in loss.named_parameters() if p.grad is not None}, calls


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_same_gradients_to_the_bit(settings: Callable[..., RunConfig], kind: str, storage: str) -> None:
    config = settings(kind, **{"lora.lora_dropout": 0.2, "lora.use_dora": True, "model.storage": storage})
    kept, once = gradients(config, recompute=False)
    recomputed, twice = gradients(config, recompute=True)
    assert (once, twice) == (1, 2)
    assert kept.keys() == recomputed.keys()
    assert all(torch.equal(gradient, recomputed[name]) for name, gradient in kept.items())
