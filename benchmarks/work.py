"""What a row of the memory benchmarks does, and how it is measured: steps of `nybble train` within a budget.

A row is MODEL BATCHxSEQ SETTING=VALUE..., like `8b 1x2048 optim.state_bits=8 memory.budget=5GiB`: a shape of shapes.py,
and settings of a run. What `memory` leaves open is the planner's to choose.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from random_model import random_model
from results import card_name
from shapes import shape_config

from nybble.adapters.inject import inject
from nybble.config import RunConfig, parse_assignment
from nybble.memory.budget import cap_allocator, peak
from nybble.models.dtypes import resolve_compute, resolve_device
from nybble.models.ends import place_ends
from nybble.models.fused.body import FusedBody
from nybble.models.fused.loss import FusedCausalLMLoss
from nybble.optim.adamw import build_optimizer
from nybble.plan import MemoryPlan
from nybble.planner.cards import DeviceSpec, card, card_of_device
from nybble.planner.run_shape import RunShape
from nybble.planner.shapes import ModelShape
from nybble.planner.solve import Choices, Solution, solve
from nybble.quant.format import NF4Spec
from nybble.train.loop import StepResult, training_steps
from nybble.train.memory import peak_host_bytes

Figures = dict[str, Any]

GIB = 2**30
HOST_BYTES = 128 * GIB
WARM_UP = 3  # two steps are launched kernel by kernel, the third is recorded as a graph
_UNITS = {"GiB": GIB, "MiB": 2**20, "GB": 10**9}


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

    @property
    def config(self) -> RunConfig:
        same = {"output": "unused", "model.name": self.model, "data.path": "unused", "train.batch_size": self.batch}
        constant = {"optim.schedule": "constant", "optim.warmup_steps": 0, "optim.learning_rate": 1e-4}
        return RunConfig.read(None, same | constant | dict(self.settings))

    @property
    def tokens_a_step(self) -> int:
        return self.batch * self.seq_len * self.config.train.gradient_accumulation

    @property
    def budget_bytes(self) -> int | None:
        """Of device memory; None: all of it."""
        return None if (budget := self.config.memory.budget) == "all" else parse_bytes(budget)

    def solve(self, device: DeviceSpec) -> Solution:
        """The fastest plan that fits the budget, as the planner sees it."""
        config = self.config
        spec = _nf4_spec(config)
        run = RunShape(
            method=config.method,
            rank=config.lora.r,
            batch=self.batch,
            seq_len=self.seq_len,
            accumulation=config.train.gradient_accumulation,
            precision=config.train.precision,
            state_bits=config.optim.state_bits,
            block_size=config.model.block_size,
            group_size=spec.group_size if spec else 0,
            cuda_graph=config.train.cuda_graph,
            deterministic=config.train.deterministic,
        )
        chosen = config.memory.model_dump(exclude={"budget"})
        shape = ModelShape.from_config(shape_config(self.model).to_dict())
        return solve(shape, run, device, Choices(**chosen, budget_bytes=self.budget_bytes))


class Run:
    """A model of random weights made to train, under its budget from before the first of them."""

    def __init__(self, work: Work) -> None:
        began = time.perf_counter()
        self.work, self.config = work, work.config
        self.device = resolve_device()
        self.card = card_here(self.device)
        self.solution = work.solve(self.card)
        self.plan = self.solution.plan
        if work.budget_bytes is not None:
            cap_allocator(work.budget_bytes, self.device, expected_beyond_bytes=self.card.context_bytes)
        compute_dtype = resolve_compute("auto", self.device)
        self.model = random_model(
            shape_config(work.model),
            device=self.device,
            spec=_nf4_spec(self.config),
            compute_dtype=compute_dtype,
            on_host=lambda path: is_on_host(path, self.plan),
        )
        inject(self.model, self.config.lora)
        place_ends(self.model, self.plan, self.device)
        body = FusedBody(self.model, samples_a_row=1, plan=self.plan, precision=self.config.train.precision)
        self.loss = FusedCausalLMLoss(self.model, body)
        self.optimizer = build_optimizer(self.loss, self.config.optim, moments=self.plan.moments)
        self.notes = [body.describe()]
        self.build_s = time.perf_counter() - began


def measure(text: str, timed: int, warm_up: int = WARM_UP) -> Figures:
    """Figures of the row `text`: memory of all its steps, and the speed of the last `timed`."""
    from stacks import batches

    work = Work.parse(text)
    run = Run(work)
    total = warm_up + timed
    shape = (total * run.config.train.gradient_accumulation, work.batch, work.seq_len)
    # Few distinct tokens: with random weights too, the loss falls as the model learns which there are.
    windows = torch.randint(10, 250, shape, generator=torch.Generator().manual_seed(0))
    results, seconds = zip(*timed_steps(run, batches(windows), total=total), strict=True)
    return figures_of(run, results, seconds[warm_up:])


def timed_steps(run: Run, micro_batches: Iterator[Any], *, total: int) -> Iterator[tuple[StepResult, float]]:
    """Each step with its seconds, until the device is done with it. The peak of memory counts from here on."""
    _reset_peak(run.device)
    steps = training_steps(run.loss, micro_batches, run.optimizer, run.config, total_steps=total)
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
    predicted = run.solution.prediction
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
        "plan": describe_plan(run.plan),
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


def card_here(device: torch.device) -> DeviceSpec:
    """This machine's, to the planner; on a CPU an H100."""
    if device.type != "cuda":
        return card("h100").with_host(HOST_BYTES)
    _, total = torch.cuda.mem_get_info(device)
    found = card_of_device(torch.cuda.get_device_name(device), total, torch.cuda.get_device_capability(device))
    return found.with_host(HOST_BYTES)


def is_on_host(path: str, plan: MemoryPlan) -> bool:
    """Whether the weights of the module at `path` are made in host memory under `plan`."""
    if path.endswith("embed_tokens"):
        return plan.embedding == "host"
    if path.endswith("lm_head"):
        return plan.head == "host"
    _, inside, rest = path.partition(".layers.")
    return bool(inside) and int(rest.partition(".")[0]) in plan.streamed()


def describe_plan(plan: MemoryPlan) -> str:
    """In a few words: `32 x keep; embedding on the host`."""
    layers = Counter(
        f"{layer.activations}{'' if layer.weights == 'resident' else f' {layer.weights}'}" for layer in plan.layers
    )
    words = [f"{count} x {name}" for name, count in layers.items()]
    words += [f"span {plan.span}"] if plan.span > 1 else []
    words += [f"MLP by {plan.mlp_rows}"] if plan.mlp_rows else []
    words += [f"{name} on the host" for name in ("embedding", "head") if getattr(plan, name) == "host"]
    words += ["moments paged"] if plan.moments == "paged" else []
    return "; ".join(words)


def parse_bytes(text: str) -> int:
    unit = next(unit for unit in _UNITS if text.endswith(unit))
    return int(float(text.removesuffix(unit)) * _UNITS[unit])


def gib(num_bytes: int) -> float:
    return round(num_bytes / GIB, 3)


def _nf4_spec(config: RunConfig) -> NF4Spec | None:
    if config.method != "qlora":
        return None
    return NF4Spec.of(config.model.block_size, double_quant=config.model.double_quant)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
