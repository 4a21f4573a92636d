"""What a row of the memory benchmarks does, and how it is measured: steps of `nybble train` within a budget.

A row is MODEL BATCHxSEQ SETTING=VALUE..., like `8b 1x2048 optim.state_bits=8 memory.budget=5GiB`: a shape of shapes.py,
and settings of a run. What `memory` leaves open is the planner's to choose.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from random_model import random_model
from results import card_name
from shapes import shape_config

from nybble.adapters.inject import inject
from nybble.config import RunConfig, parse_assignment
from nybble.memory.budget import cap_allocator, expand_segments, peak
from nybble.models.dtypes import resolve_compute, resolve_device
from nybble.models.ends import place_ends
from nybble.models.fused.body import FusedBody
from nybble.models.fused.loss import FusedCausalLMLoss
from nybble.optim.adamw import build_optimizer
from nybble.planner.cards import DeviceSpec, card
from nybble.planner.shapes import ModelShape
from nybble.planner.words import in_one_line
from nybble.quant.format import NF4Spec
from nybble.train.card import card_here
from nybble.train.determinism import deterministic_kernels
from nybble.train.loop import StepResult, step_executor, training_steps
from nybble.train.memory import peak_host_bytes
from nybble.train.plan import Rows, RunPlan, plan_run
from nybble.train.predicted import window_bytes

Figures = dict[str, Any]

GIB = 2**30
HOST_BYTES = 128 * GIB  # of the goals
WARM_UP = 3  # two steps are launched kernel by kernel, the third is recorded as a graph


@dataclass(frozen=True)
class Work:
    model: str
    batch: int
    seq_len: int
    settings: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Work:
        model, size, *settings = text.split()
        batch, _, seq_len = size.partition("x")
        return cls(model, int(batch), int(seq_len), tuple(map(parse_assignment, settings)))

    def __str__(self) -> str:
        return " ".join(
            [self.model, f"{self.batch}x{self.seq_len}", *(f"{name}={value}" for name, value in self.settings)]
        )

    @classmethod
    def row(cls, text: str) -> str:
        """`text` if it is a row, for argparse."""
        return str(cls.parse(text))

    @property
    def config(self) -> RunConfig:
        same = {"output": "unused", "model.name": self.model, "data.path": "unused", "train.batch_size": self.batch}
        constant = {"optim.schedule": "constant", "optim.warmup_steps": 0, "optim.learning_rate": 1e-4}
        return RunConfig.read(None, same | constant | dict(self.settings))

    @property
    def tokens_a_step(self) -> int:
        return self.batch * self.seq_len * self.config.train.gradient_accumulation

    def plan(self, card: DeviceSpec) -> RunPlan:
        """As `nybble train` would plan it for a GPU."""
        shape = ModelShape.from_config(shape_config(self.model).to_dict())
        return plan_run(self.config, shape, card, rows=Rows(self.seq_len))


class Run:
    """A model of random weights made to train, under its budget from before the first of them."""

    def __init__(self, work: Work, host_bytes: int = HOST_BYTES) -> None:
        began = time.perf_counter()
        self.work, self.config = work, work.config
        self.device = resolve_device()
        expand_segments()
        self.planned = work.plan(card_for(self.device, host_bytes))
        self.plan = self.planned.memory
        here = self.planned.card
        if budget_bytes := self.config.memory.budget_bytes:
            cap_allocator(budget_bytes, self.device, expected_beyond_bytes=here.context_bytes)
        settings = self.config.model
        spec = NF4Spec.of(settings.block_size, double_quant=settings.double_quant)
        self.model = random_model(
            shape_config(work.model),
            device=self.device,
            spec=spec if self.config.method == "qlora" else None,
            head_spec=spec if settings.head == "nf4" else None,
            compute_dtype=resolve_compute("auto", self.device),
            plan=self.plan,
        )
        inject(self.model, self.config.lora, device=self.device)
        place_ends(self.model, self.plan, self.device)
        body = FusedBody(self.model, samples_a_row=1, plan=self.plan, precision=self.config.train.precision)
        self.loss = FusedCausalLMLoss(self.model, body)
        self.optimizer = build_optimizer(self.loss, self.config.optim, moments=self.plan.moments)
        self.notes = [body.describe()]
        self.build_s = time.perf_counter() - began


def measure(text: str, timed: int, warm_up: int = WARM_UP, host_bytes: int = HOST_BYTES) -> Figures:
    """Figures of the row `text`: memory of all its steps, and the speed of the last `timed`.

    host_bytes: of host memory that the plan may lock.
    """
    from stacks import batches

    work = Work.parse(text)
    run = Run(work, host_bytes)
    total = warm_up + timed
    shape = (total * run.config.train.gradient_accumulation, work.batch, work.seq_len)
    # Few distinct tokens: with random weights too, the loss falls as the model learns which there are.
    windows = torch.randint(10, 250, shape, generator=torch.Generator().manual_seed(0))
    results, seconds = zip(*timed_steps(run, batches(windows), total=total), strict=True)
    return figures_of(run, results, seconds[warm_up:])


def timed_steps(run: Run, micro_batches: Iterator[Any], *, total: int) -> Iterator[tuple[StepResult, float]]:
    """Each step with its seconds, until the device is done with it. The peak of memory counts from here on."""
    _reset_peak(run.device)
    executor = step_executor(run.loss, run.optimizer, run.config, window_bytes=window_bytes(run.planned))
    steps = training_steps(run.loss, micro_batches, run.optimizer, run.config, total_steps=total, executor=executor)
    with deterministic_kernels(enabled=run.config.train.deterministic):
        while True:
            began = time.perf_counter()
            result = next(steps, None)
            if result is None:
                return
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            run.notes += [result.note] if result.note else []
            yield result, time.perf_counter() - began


def figures_of(run: Run, results: Sequence[StepResult], seconds: Sequence[float]) -> Figures:
    assert run.planned.solution is not None
    predicted = run.planned.solution.prediction
    step_s = statistics.median(seconds)
    used = peak(run.device)
    return {
        "tokens_per_second": round(run.work.tokens_a_step / step_s, 1),
        "step_seconds": [round(s, 4) for s in seconds],
        "peak_allocated_gib": gib(used.allocated_bytes),
        "peak_reserved_gib": gib(used.reserved_bytes),
        "beyond_gib": gib(used.beyond_bytes),
        "peak_gib": gib(used.total_bytes),
        "predicted_gib": gib(predicted.phases["step"].device_bytes),
        "predicted_allocated_gib": gib(predicted.allocated_bytes),
        "predicted_reserved_gib": gib(predicted.reserved_bytes),
        "predicted_tokens_per_second": round(predicted.tokens_per_second, 1),
        "predicted_parts_gib": {name: gib(part) for name, part in predicted.phases["step"].device.items()},
        "plan": in_one_line(run.plan),
        "host_peak_gib": gib(peak_host_bytes()),
        "build_seconds": round(run.build_s, 1),
        "loss": [round(result.loss, 4) for result in results],
        "grad_norm": [round(result.grad_norm, 4) for result in results],
        "notes": run.notes,
        "device": card_name(),
    }


def shown(figures: Figures) -> str:
    """A row in one line."""
    text = (
        "{row}: {tokens_per_second:,.0f} tok/s (predicted {predicted_tokens_per_second:,.0f})  peak {peak_gib:.2f} GiB "
        "(predicted {predicted_gib:.2f}; reserved {peak_reserved_gib:.2f}, allocated {peak_allocated_gib:.2f})  "
    ).format(**figures)
    first, last = (f"{figures['loss'][i]:.3f} (norm {figures['grad_norm'][i]:.2f})" for i in (0, -1))
    return f"{text}loss {first} -> {last}  [{figures['plan']}; {figures['process_s']} s]  {'; '.join(figures['notes'])}"


def card_for(device: torch.device, host_bytes: int) -> DeviceSpec:
    """The card at hand, or an H100, with so much host memory: a virtual machine may show less than it has."""
    return (card_here(device) if device.type == "cuda" else card("h100")).with_host(host_bytes)


def gib(num_bytes: int) -> float:
    return round(num_bytes / GIB, 3)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
