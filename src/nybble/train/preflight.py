"""Checks before the first step, so that a run never trains nothing and says it trained.

They change nothing: parameters, gradients and the state of random numbers are the same bits with and without.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nybble.adapters.config import LoraConfig
from nybble.adapters.names import PRESETS
from nybble.adapters.report import InjectionReport
from nybble.config import TrainConfig
from nybble.data.collate import Batch
from nybble.data.prepare import DataReport, PreparedData
from nybble.errors import UserError, listed
from nybble.files import check_writable
from nybble.models.modes import kept_modes
from nybble.models.skeleton import expert_parameters
from nybble.sharded import full_tensor
from nybble.train.processes import sum_over_ranks
from nybble.units import format_bytes

# Named in full up to here; the rest of a long list is only counted.
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Preflight:
    """What the checks found out.

    loss: of the first micro-batch, mean over its target tokens. gradient_tensors: trained tensors, all of which get a
    gradient. checkpoint_bytes, needed_bytes: estimates of one checkpoint and of all that the run writes.
    """

    loss: float
    gradient_tensors: int
    checkpoint_bytes: int
    needed_bytes: int
    free_bytes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"checked: {self.gradient_tensors} of {self.gradient_tensors} trained tensors get a gradient; "
            f"first loss {self.loss:.4f}; disk {format_bytes(self.needed_bytes)} of {format_bytes(self.free_bytes)}"
        )


def preflight(
    loss_module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    *,
    output: Path,
    final_bytes: int,
    start_bytes: int = 0,
    num_checkpoints: int,
    may_overflow: bool = False,
) -> Preflight:
    """Run one real micro-batch forward and backward as training will, and see whether the disk holds what it writes.

    parameters: all that are trained, by name. final_bytes: size of the adapter or model written at the end.
    start_bytes: of where the adapter began, a part of each checkpoint. Raises UserError with every problem found.
    """
    started = time.perf_counter()
    checkpoint_bytes = estimate_checkpoint_bytes(parameters) + start_bytes
    needed_bytes = num_checkpoints * checkpoint_bytes + final_bytes
    free_bytes = check_disk(output, needed_bytes)
    loss, problems = check_gradients(loss_module, parameters, batch, may_overflow=may_overflow)
    if problems:
        raise UserError(
            listed("training would not do what it should:", problems),
            where="before the first step",
            fix="No step was made and nothing was written.",
        )
    seconds = time.perf_counter() - started
    return Preflight(loss, len(parameters), checkpoint_bytes, needed_bytes, free_bytes, seconds)


def check_gradients(
    loss_module: nn.Module, parameters: Mapping[str, nn.Parameter], batch: Batch, *, may_overflow: bool = False
) -> tuple[float, list[str]]:
    """The loss of `batch` and what is wrong with it or with the gradients it gives `parameters`.

    Every tensor must get a gradient, and lora_B one that is not zero. lora_A's is zero as long as B is, so there it is
    enough that it exists: the graph reaches it. may_overflow: fp16 arithmetic, where the loss scale sees to overflow.
    """
    with _untouched(loss_module, parameters):
        # The sum, not the mean: in fp16 that keeps small gradients from vanishing without any loss scale.
        loss = loss_module(batch.input_ids, batch.labels, batch.position_ids)
        if loss.requires_grad:
            loss.backward()
        gradients = {name: parameter.grad for name, parameter in parameters.items()}
        mean = float(sum_over_ranks(loss.detach().double()) / sum_over_ranks(_count(batch, loss.device)))
        return mean, _judge(mean, gradients, may_overflow)


def check_disk(folder: Path, needed_bytes: int) -> int:
    """Raise UserError unless `folder` can be written to and its disk has room; returns the bytes free there."""
    check_writable(folder)
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise UserError(
            f"the run needs about {format_bytes(needed_bytes)} on this disk, and {format_bytes(free)} are free",
            where=folder,
            fix="Free some space, lower train.keep_checkpoints, or choose another output folder.",
        )
    return free


def estimate_checkpoint_bytes(parameters: Mapping[str, nn.Parameter]) -> int:
    """Bytes of one checkpoint, at most: each trained tensor and AdamW's two moments of it in fp32."""
    return sum(parameter.numel() * (parameter.element_size() + 2 * 4) for parameter in parameters.values())


def count_checkpoints(total_steps: int, config: TrainConfig) -> int:
    """How many checkpoints lie on the disk at once at most: those kept, the best one, and the one being written."""
    written = 1 + sum(total_steps // every for every in (config.save_every, config.eval_every) if every)
    return min(written, config.keep_checkpoints + 2)


def check_data(report: DataReport) -> None:
    """Raise UserError when the rows would teach the model never to stop, or to expect two BOS."""
    problems = []
    if report.target_tokens == 0:
        problems.append("no token carries loss")
    if not report.eos_trained:
        problems.append(
            f"only {report.ended} of {report.samples} samples train the token that ends them ({report.truncated} were "
            "cut): the model would not learn to stop"
        )
    if report.bos_doubled:
        problems.append("samples begin with two BOS tokens: the chat template and the data both write one")
    if problems:
        fix = "`nybble preview` shows which tokens are trained. Samples that are cut need a higher data.max_length."
        raise UserError(listed("the data would be learnt wrongly:", problems), where="data", fix=fix)


def data_notes(data: PreparedData) -> list[str]:
    """What became of rows that is worth knowing and no reason to refuse them, and whether an earlier run made them."""
    report, held_out = data.report, data.validation_report
    counted = {
        "samples were cut to data.max_length": report.truncated,
        "samples were left out, as nothing trained was left of them": report.dropped,
        "answers are rendered by the chat template otherwise than they are written": report.altered,
        "held-out rows are training rows too, so the held-out loss flatters": held_out.duplicates if held_out else 0,
    }
    notes = ["data from cache"] if data.from_cache else []
    notes += [f"note: {count} {what}" for what, count in counted.items() if count]
    if report.bos_missing:
        notes.append("note: the tokenizer begins texts with BOS, the chat template does not")
    return notes


def check_coverage(model: nn.Module, report: InjectionReport, config: LoraConfig) -> None:
    """Raise UserError when the adapter reaches less of the model than the settings say."""
    problems = []
    # A regular expression or an exclusion leaves layers out on purpose; names and presets mean every block.
    by_name = config.target_modules in PRESETS or not isinstance(config.target_modules, str)
    if by_name and not config.exclude_modules:
        problems += ["{}: {} of {} are adapted".format(name, *report.layers[name]) for name in report.partial]
        if report.untouched_blocks:
            problems.append(f"blocks without an adapter: {', '.join(report.untouched_blocks)}")
    experts = list(expert_parameters(model))
    if config.target_modules == "all-linear" and experts:
        problems.append(
            f"weights of experts are no linear layers, so they get no adapter: {', '.join(experts[:2])}, ..."
        )
    if problems:
        raise UserError(
            listed("the adapter reaches less than lora.target_modules says:", [*problems, *report.reach_lines()]),
            where="lora",
            fix="Name the layers that you mean in lora.target_modules ('attention', a list, or a regular expression).",
        )


@contextlib.contextmanager
def _untouched(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    before = {parameter: parameter.grad for parameter in parameters.values()}
    devices = {parameter.device for parameter in before if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)), kept_modes(module):
            module.train()
            module.zero_grad(set_to_none=True)
            yield
    finally:
        for parameter, gradient in before.items():
            parameter.grad = gradient


def _count(batch: Batch, device: torch.device) -> Tensor:
    return torch.tensor(float(batch.target_tokens), dtype=torch.float64, device=device)


def _judge(loss: float, gradients: Mapping[str, Tensor | None], may_overflow: bool) -> list[str]:
    if not math.isfinite(loss):
        return [f"the loss of the first batch is {loss}"]
    missing, infinite, zero = [], [], []
    for name, gradient in gradients.items():
        if gradient is None:
            missing.append(name)
            continue
        whole = full_tensor(gradient)
        if not may_overflow and not whole.isfinite().all():
            infinite.append(name)
        elif name.endswith(".lora_B") and not whole.any():
            zero.append(name)
    return [
        *_problem("get no gradient (the loss does not depend on them)", missing, len(gradients)),
        *_problem("get a gradient that is not finite", infinite, len(gradients)),
        *_problem("get a gradient that is zero", zero, len(gradients)),
    ]


def _problem(what: str, names: list[str], total: int) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return [f"{len(names)} of {total} trained tensors {what}: {', '.join(names[:_NAMES_SHOWN])}{more}"]
