"""Optimizer steps as a generator: whoever trains writes a `for` around it and does the rest in plain code."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from nybble.config import RunConfig
from nybble.data.collate import Batch
from nybble.errors import TrainingDiverged
from nybble.optim.schedule import learning_rate
from nybble.train.graph import GraphStep, Recorder
from nybble.train.memory import peak_device_bytes
from nybble.train.out_of_memory import suggestion
from nybble.train.processes import rank, world_size
from nybble.train.retry import RetryingStep
from nybble.train.step import EagerStep, Figures
from nybble.train.window import Shapes, windows


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. Figures cover all micro-batches of the step and all processes.

    loss: mean over the target tokens, before the update. grad_norm: before clipping. lr: the rate of this update.
    peak_bytes: of this process's device so far (host memory on a CPU). skipped: fp16 gradients overflowed, so the
    weights were left as they were and the loss scale was halved. note: what is worth knowing about how steps are done.
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
    note: str | None = None


def training_steps(
    loss_module: nn.Module,
    micro_batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    *,
    total_steps: int,
    first_step: int = 0,
    scaler: GradScaler | None = None,
    executor: RetryingStep | None = None,
) -> Iterator[StepResult]:
    """Train one optimizer step for each value taken, until `total_steps` are done or the micro-batches run out.

    loss_module(input_ids, labels, position_ids) returns the sum of the loss over the target tokens; with an attribute
    `capturable` that is true it does so without waiting for the device, and steps run as CUDA graphs where they can.
    `micro_batches` begin with the first one of step `first_step + 1`, and are taken one step ahead. Dropout's
    randomness depends on the seed, the rank and the step alone, so a resumed run draws what an uninterrupted one
    draws. A step never updates with a non-finite gradient: it raises TrainingDiverged with the weights of the step
    before. `scaler`: for fp16 arithmetic, then such steps are skipped. `executor`: what does the steps, by default
    `step_executor` of the rest.
    """
    executor = executor or step_executor(loss_module, optimizer, config, scaler)
    device = optimizer.param_groups[0]["params"][0].device
    ahead = windows(micro_batches, config.train.gradient_accumulation, pinned=device.type == "cuda")
    ahead = islice(ahead, total_steps - first_step)
    window = next(ahead, None)
    loss_module.train()
    for step in range(first_step + 1, total_steps + 1):
        if window is None:
            return
        started = time.perf_counter()
        lr = _set_learning_rate(optimizer, learning_rate(step, total_steps, config.optim))
        note = executor.launch(window, _seed(config.train.seed, step))
        window = next(ahead, None)  # while the device works
        figures = executor.read()
        skipped = _stop_or_skip(step, figures, scaler)
        executor.finish()
        yield StepResult(
            step,
            figures.loss,
            figures.target_tokens,
            figures.grad_norm,
            lr,
            seconds=time.perf_counter() - started,
            peak_bytes=peak_device_bytes(device),
            tokens=figures.tokens,
            skipped=skipped,
            note=note,
        )


def step_executor(
    loss_module: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    scaler: GradScaler | None = None,
    *,
    window_bytes: Callable[[Shapes], int] | None = None,
    suggest: Callable[[], str] | None = None,
) -> RetryingStep:
    """What does the steps of a run: as CUDA graphs where it may, and again where memory runs out.

    window_bytes, suggest: as RetryingStep has them. Build it when all that goes before the first step is done.
    """
    eager = EagerStep(loss_module, optimizer, config.optim.max_grad_norm, scaler)
    capturable = getattr(loss_module, "capturable", False) and eager.updates_at_once and world_size() == 1
    as_graphs = config.train.cuda_graph and capturable and eager.device.type == "cuda"
    graphs = GraphStep(eager, Recorder(eager.device)) if as_graphs else None
    return RetryingStep(
        eager, graphs, window_bytes=window_bytes, suggest=suggest or functools.partial(suggestion, config)
    )


def _seed(seed: int, step: int) -> int:
    # Two large primes keep runs that differ by one in seed or rank from sharing the randomness of nearby steps.
    return ((seed * 1_000_003 + rank()) * 998_244_353 + step) % 2**63


def _set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> float:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    return lr


def _stop_or_skip(step: int, figures: Figures, scaler: GradScaler | None) -> bool:
    """Whether this fp16 step is skipped; raises TrainingDiverged if going on would spoil the weights or is hopeless."""
    if math.isfinite(figures.loss) and math.isfinite(figures.grad_norm):
        return False
    where, fix = f"step {step}", "Try a lower learning rate."
    if not math.isfinite(figures.loss):
        raise TrainingDiverged(f"the loss is {figures.loss}", where=where, fix=fix)
    # Halved at each overflow from 65536: below 1 the overflow does not come from the scale.
    if scaler is None or scaler.get_scale() < 1:
        raise TrainingDiverged(f"the gradient norm is {figures.grad_norm}", where=where, fix=fix)
    return True
