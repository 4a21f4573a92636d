"""How likely a model finds given tokens, and whether they are what it would have said itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.models.loss import CausalLMLoss
from nybble.models.modes import evaluation_mode


@dataclass(frozen=True)
class Likelihood:
    """Of a sequence's target tokens: the sum of their log-probabilities, and whether each is the likeliest."""

    log_probability: float
    greedy: bool


@torch.no_grad()
def target_likelihoods(loss: CausalLMLoss, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> list[Likelihood]:
    """The likelihood of each row's target tokens; logits are made for a few rows at a time, as for the loss.

    input_ids, labels, position_ids: (batch, seq_len) as `CausalLMLoss` takes them.
    """
    head = loss.model.get_output_embeddings()
    with evaluation_mode(loss):
        hidden, targets, where = loss.target_rows(input_ids, labels, position_ids)
        sums = torch.zeros(len(labels), dtype=torch.float64, device=hidden.device)
        misses = torch.zeros(len(labels), dtype=torch.int64, device=hidden.device)
        chunks = (torch.split(tensor, loss.rows_a_chunk) for tensor in (hidden, targets, where // labels.shape[1]))
        for states, expected, row in zip(*chunks, strict=True):
            logits = loss.logit_rule(head(states))
            chosen = torch.log_softmax(logits, dim=-1).gather(1, expected[:, None]).squeeze(1)
            sums.index_add_(0, row, chosen.double())
            misses.index_add_(0, row, (logits.argmax(dim=-1) != expected).long())
    return [Likelihood(total, missed == 0) for total, missed in zip(sums.tolist(), misses.tolist(), strict=True)]
