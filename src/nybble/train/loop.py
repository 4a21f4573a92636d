"""Optimizer steps as a generator: whoever trains writes a `for` around it and does the rest in plain code."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from nybble.config import RunConfig
from nybble.data.collate import Batch
from nybble.errors import TrainingStopped
from nybble.optim.schedule import learning_rate
from nybble.sharded import full_tensor
from nybble.train.memory import peak_device_bytes
from nybble.train.processes import gradient_sync, rank, sum_over_ranks, world_size


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. Figures cover all micro-batches of the step and all processes.

    loss: mean over the target tokens, before the update. grad_norm: before clipping. lr: the rate of this update.
    peak_bytes: of this process's device so far (host memory on a CPU). skipped: fp16 gradients overflowed, so the
    weights were left as they were and the loss scale was halved.
    """

    step: int
    loss: float
    target_tokens: int
    grad_norm: float
    lr: float
    seconds: float
    peak_bytes: int
    tokens: int  # with padding
    skipped: bool = False


def training_steps(
    loss_module: nn.Module,
    micro_batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    *,
    total_steps: int,
    first_step: int = 0,
    scaler: GradScaler | None = None,
) -> Iterator[StepResult]:
    """Train one optimizer step for each value taken, until `total_steps` are done or the micro-batches run out.

    loss_module(input_ids, labels, position_ids) returns the sum of the loss over the target tokens. `micro_batches`
    begin with the first one of step `first_step + 1`. Dropout's randomness depends on the seed, the rank and the step
    alone, so a resumed run draws what an uninterrupted one draws. The step's figures are read before the update (the
    only time the host waits for the device), which therefore never sees a non-finite gradient: it raises
    TrainingStopped with the weights of the step before. `scaler`: for fp16 arithmetic, then such steps are skipped.
    """
    device = optimizer.param_groups[0]["params"][0].device
    stream = iter(micro_batches)
    loss_module.train()
    for step in range(first_step + 1, total_steps + 1):
        started = time.perf_counter()
        window = [batch.to(device) for batch in islice(stream, config.train.gradient_accumulation)]
        if not window:
            return
        _seed_step(config.train.seed, step)
        lr = _set_learning_rate(optimizer, learning_rate(step, total_steps, config.optim))
        target_tokens, tokens = sum_over_ranks(_count_tokens(window, device)).unbind()
        loss_sum = _backward(loss_module, window, target_tokens, scaler)
        if scaler is not None:
            scaler.unscale_(optimizer)
        grad_norm = _clip(optimizer, config.optim.max_grad_norm)
        loss, norm, *counts = _read(sum_over_ranks(loss_sum) / target_tokens, grad_norm, target_tokens, tokens)
        skipped = _stop_or_skip(step, loss, norm, scaler)
        _update(optimizer, scaler)
        seconds = time.perf_counter() - started
        peak = peak_device_bytes(device)
        yield StepResult(step, loss, int(counts[0]), norm, lr, seconds, peak, int(counts[1]), skipped)


def _seed_step(seed: int, step: int) -> None:
    # Two large primes keep runs that differ by one in seed or rank from sharing the randomness of nearby steps.
    torch.manual_seed((seed * 1_000_003 + rank()) * 998_244_353 + step)


def _set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def _count_tokens(window: list[Batch], device: torch.device) -> Tensor:
    """Target tokens and all tokens of this process, (2,) fp64."""
    counts = [sum(batch.target_tokens for batch in window), sum(batch.input_ids.numel() for batch in window)]
    return torch.tensor(counts, dtype=torch.float64, device=device)


def _backward(loss_module: nn.Module, window: list[Batch], target_tokens: Tensor, scaler: GradScaler | None) -> Tensor:
    """Add the window's gradients; returns this process's sum of the loss (fp64 scalar).

    Each micro-batch's sum is divided by the whole window's number of target tokens, so that n micro-batches of m
    sequences give the gradient of m micro-batches of n, however the tokens are spread.
    """
    loss_sum = torch.zeros((), dtype=torch.float64, device=target_tokens.device)
    for index, batch in enumerate(window):
        with gradient_sync(loss_module, enabled=index == len(window) - 1):
            loss = loss_module(batch.input_ids, batch.labels, batch.position_ids)
            # Gradients are averaged over processes, but the tokens that divide them were counted over all of them.
            share = loss * (world_size() / target_tokens).to(loss.dtype)
            (share if scaler is None else scaler.scale(share)).backward()
        loss_sum += loss.detach().double()
    return loss_sum


def _clip(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """Scale all gradients so that their joint norm is at most `max_norm` (0: leave them); returns the norm before."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = full_tensor(get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if max_norm:
        clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _read(*values: Tensor) -> list[float]:
    figures: list[float] = torch.stack([value.detach().double() for value in values]).tolist()
    return figures


def _stop_or_skip(step: int, loss: float, norm: float, scaler: GradScaler | None) -> bool:
    """Whether this fp16 step is skipped; raises TrainingStopped if going on would spoil the weights or is hopeless."""
    if math.isfinite(loss) and math.isfinite(norm):
        return False
    if not math.isfinite(loss):
        raise TrainingStopped(f"the loss is {loss}", where=f"step {step}", fix="Try a lower learning rate.")
    # Halved at each overflow from 65536: below 1 the overflow does not come from the scale.
    if scaler is None or scaler.get_scale() < 1:
        raise TrainingStopped(f"the gradient norm is {norm}", where=f"step {step}", fix="Try a lower learning rate.")
    return True


def _update(optimizer: torch.optim.Optimizer, scaler: GradScaler | None) -> None:
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()
