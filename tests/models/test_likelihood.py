"""Likelihoods of given tokens against whole logits in float64."""

from __future__ import annotations

import pytest
import torch

from nybble.models.likelihood import target_likelihoods
from nybble.models.loss import CausalLMLoss
from tests.tiny import TOKENS, random_model


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_it_is_what_whole_logits_give(kind: str) -> None:
    model = random_model(kind).double()
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(4, TOKENS, (3, 20), generator=generator)
    ids[2, 11:] = model.generate(ids[2:, :11], max_new_tokens=9, min_new_tokens=9, do_sample=False)[0, 11:]
    with torch.no_grad():
        logits = model(ids).logits
    trained = torch.rand(3, 20, generator=generator) < 0.4
    trained[:, 0] = False
    trained[2] = torch.arange(20) >= 11
    labels = torch.where(trained, ids, -100)
    loss = CausalLMLoss(model, chunk_bytes=4 * 408 * 7)  # seven rows of logits at a time
    found = target_likelihoods(loss, ids, labels, torch.arange(20).expand(3, -1))
    shares = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    expected = (shares * trained[:, 1:]).sum(1)
    assert [row.log_probability for row in found] == pytest.approx(expected.tolist(), rel=1e-9)
    assert [row.greedy for row in found] == [False, False, True]
