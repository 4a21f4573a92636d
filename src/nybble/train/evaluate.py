"""Loss on held-out rows, exact over tokens however they are batched or spread over processes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from nybble.data.collate import Batch
from nybble.models.device import compute_device
from nybble.models.modes import evaluation_mode
from nybble.train.processes import sum_over_ranks


@dataclass(frozen=True)
class EvalResult:
    """loss: mean over all target tokens, in nats."""

    loss: float
    target_tokens: int


def evaluate(loss_module: nn.Module, batches: Iterable[Batch]) -> EvalResult:
    """Mean loss over the target tokens of `batches`; every process brings its share and gets the whole result.

    Leaves the module's mode, its gradients and the randomness as they were.
    """
    device = compute_device(loss_module)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, target tokens
    with evaluation_mode(loss_module), torch.no_grad():
        for batch in batches:
            on_device = batch.to(device)
            sums[0] += loss_module(on_device.input_ids, on_device.labels, on_device.position_ids).double()
            sums[1] += batch.target_tokens
    loss_sum, target_tokens = sum_over_ranks(sums).tolist()
    return EvalResult(loss=loss_sum / target_tokens if target_tokens else math.nan, target_tokens=int(target_tokens))
