"""What is behind a model's last layer: its logits, and the gradients of a loss of them, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nybble.calibrate.calls import without_layers
from nybble.models.logits import find_logit_rule
from nybble.models.loss import rows_within

CHUNK_BYTES = 128 * 2**20  # fp32 logits of one chunk; five times as much is held

Logits = Callable[[Tensor], Tensor]


def logits_of(model: PreTrainedModel) -> Logits:
    """The model's head, from its last hidden states on; raises UserError where it makes logits in an unknown way."""
    with without_layers(model):
        rule = find_logit_rule(model)
    head = model.get_output_embeddings()
    return lambda rows: rule(head(rows))


def rows_a_chunk(model: PreTrainedModel) -> int:
    return rows_within(CHUNK_BYTES, model.config.get_text_config().vocab_size)


def gradient_at(
    hidden: Tensor,
    go_on: Callable[[Tensor], Tensor],
    logits: Logits,
    loss: Callable[[slice, Tensor], Tensor],
    chunk_rows: int,
) -> Tensor:
    """The gradient of a summed loss at `hidden`, (windows, length, hidden_size), which the last layer gives.

    go_on: to the last hidden states. loss: of the logits of some rows, windows * length, which a slice names.
    """
    with torch.enable_grad():
        given = hidden.detach().requires_grad_()
        rows = go_on(given).flatten(0, 1)
    gradient = torch.empty_like(rows)
    for start in range(0, len(rows), chunk_rows):
        chunk = slice(start, start + chunk_rows)
        with torch.enable_grad():
            part = rows[chunk].detach().requires_grad_()
            value = loss(chunk, logits(part))
        (gradient[chunk],) = torch.autograd.grad(value, part)
    (at_hidden,) = torch.autograd.grad(rows, given, gradient)
    return at_hidden
