"""How a run will hold what it needs: decided from its settings and the model's config.json, before anything is loaded.

Nothing here imports torch, so that `nybble plan` answers at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nybble.config import RunConfig
from nybble.errors import UserError
from nybble.memory.config import MemoryConfig
from nybble.plan import LayerPolicy, MemoryPlan
from nybble.planner.cards import DeviceSpec
from nybble.planner.prediction import Prediction
from nybble.planner.reach import Reach, reach
from nybble.planner.run_shape import RunShape
from nybble.planner.shapes import ModelShape
from nybble.planner.solve import Change, Choices, Solution, solve
from nybble.planner.words import figures, fit_lines, in_one_line
from nybble.quant.format import NF4Spec

# A prediction is within 5 % of what is measured: what is predicted to exceed the budget by less may fit.
_TOLERANCE = 1.05
# Predictions may be so much too low: under a budget of 2.5 GiB steps ran out that were predicted to take 2.46.
_SPARE, _SMALL_SPARE, _SMALL_SPARE_BYTES = 0.02, 0.04, 100 * 2**20
_STORED_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_WIDEST_RANK = 128  # that fused regions take
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # as config.json has it
_ELSEWHERE: tuple[Literal["resident", "streamed"], ...] = ("resident", "streamed")
# Of several processes each has all on its own card.
_ON_CARD: dict[str, Any] = {"weights": "resident", "embedding": "device", "head": "device", "moments": "resident"}


@dataclass(frozen=True)
class Rows:
    """The longest rows of a run: tokens in training and in evaluation (0: there is none), most samples in one."""

    seq_len: int
    evaluation_len: int = 0
    samples: int = 1


@dataclass(frozen=True)
class RunPlan:
    """What a run does about memory.

    stock: why stock modules compute it, None if fused regions do. solution: how the planner came to it; None for a
    model whose sizes it does not know. on_gpu: on a CPU a prediction is good for choosing between plans only.
    """

    memory: MemoryPlan
    card: DeviceSpec
    stock: str | None
    shape: ModelShape | None = None
    solution: Solution | None = None
    on_gpu: bool = True

    @property
    def prediction(self) -> Prediction | None:
        """What to expect, where it can be told."""
        return self.solution.prediction if self.solution is not None and self.on_gpu else None

    def lines(self) -> list[str]:
        """For printing, before anything is loaded."""
        plan = f"plan: {in_one_line(self.memory)}"
        if not self.on_gpu:
            return [plan]
        return [plan, *fit_lines(self.solution)] if self.solution else [f"{plan} (nothing is predicted for this model)"]

    def require_fit(self) -> None:
        """Raise UserError if the run is predicted to need more than there is."""
        solution = self.solution
        if solution is not None and solution.prediction.peak_bytes > _TOLERANCE * solution.budget_bytes:
            what, *rest = fit_lines(solution)
            raise UserError(f"the run does not fit: {what}", where="memory", fix="\n".join(rest) or None)

    def smaller(self, budget_bytes: int) -> str | None:
        """The plan for a smaller budget, with nothing else fixed, in words; None if none fits there."""
        if self.solution is None or self.shape is None:
            return None
        fixed = Choices(budget_bytes=budget_bytes)
        found = _solve(self.shape, self.solution.run, self.card, fixed, in_files=False)
        return f"{in_one_line(found.plan)} ({figures(found.prediction)})" if found.fits else None


def plan_run(
    config: RunConfig,
    model: Mapping[str, Any] | ModelShape,
    card: DeviceSpec,
    *,
    rows: Rows,
    on_gpu: bool = True,
    processes: int = 1,
) -> RunPlan:
    """The plan of a run on `card`, whose memory is what it may have unless `memory.budget` is less.

    model: config.json, or the shape itself. Raises UserError for settings of memory that cannot be carried out.
    """
    shape = model if isinstance(model, ModelShape) else _shape(model)
    stock = _why_stock(config, shape, on_gpu=on_gpu, processes=processes)
    if stock is not None:
        require_possible(config, stock)
    if processes > 1:
        _require_on_card(config.memory)
    sharded = processes > 1 and config.train.distributed == "fsdp2"
    if shape is None or sharded:
        return RunPlan(_unplanned(config.memory, _num_layers(model)), card, stock, on_gpu=on_gpu)
    run = run_shape(config, shape, rows, fused=stock is None, compute_bytes=_compute_bytes(config, on_gpu=on_gpu))
    fixed = choices(config, shape)
    if processes > 1:
        fixed = dataclasses.replace(fixed, **_ON_CARD)
    solution = _solve(shape, run, card, fixed, in_files=_files_hold_weights(config, model))
    return RunPlan(solution.plan, card, stock, shape, solution, on_gpu)


def run_shape(
    config: RunConfig, model: ModelShape, rows: Rows, *, fused: bool = True, compute_bytes: int = 2
) -> RunShape:
    """The sizes of a run with these settings over `model`."""
    train, storage = config.train, config.model.storage
    reached = _reach(config, model)
    return RunShape(
        method="qlora" if storage == "nf4" else config.method,
        targets=reached.targets if reached else (),
        rank=reached.rank if reached else 0,
        batch=train.batch_size,
        seq_len=rows.seq_len,
        accumulation=train.gradient_accumulation,
        samples_a_row=rows.samples,
        precision=train.precision,
        state_bits=config.optim.state_bits,
        nf4=NF4Spec.of(config.model.block_size, double_quant=config.model.double_quant),
        storage_bytes=_STORED_BYTES.get(storage, model.dtype_bytes),
        nf4_head=config.model.head == "nf4",
        compute_bytes=compute_bytes,
        adapter_bytes=_STORED_BYTES[config.lora.dtype],
        cuda_graph=train.cuda_graph,
        fused=fused,
        deterministic=train.deterministic,
        evaluation_len=rows.evaluation_len,
    )


def choices(config: RunConfig, model: ModelShape) -> Choices:
    """What of the plan the settings fix, and what follows from what is trained: that must lie on the card."""
    reached = _reach(config, model)
    fixed = config.memory.model_dump(exclude={"budget"})
    if reached is None or reached.ends_trained:
        for end in ("embedding", "head"):
            if fixed[end] == "host":
                fix = "Use device, or leave the head and embedding out of what is trained."
                raise UserError("what is trained cannot lie in host memory", where=f"memory.{end}", fix=fix)
            fixed[end] = "device"
    if config.model.head == "nf4":
        if fixed["head"] == "host":
            fix = "Use device, where it takes a quarter, or model.head=16bit."
            raise UserError("a head in NF4 lies on the device", where="memory.head", fix=fix)
        fixed["head"] = "device"
    elif model.tied:  # one matrix
        places = {fixed[end] for end in ("embedding", "head")} - {"auto"}
        if len(places) > 1:
            what = "this model's embedding and head are one matrix, which cannot lie in two places"
            raise UserError(what, where="memory.embedding, memory.head", fix="Give both the same place.")
        fixed |= dict.fromkeys(("embedding", "head"), next(iter(places), "auto"))
    return Choices(**fixed, budget_bytes=config.memory.budget_bytes)


def trained_parameters(config: RunConfig, model: ModelShape) -> int:
    """How many parameters train, exactly."""
    reached = _reach(config, model)
    return model.parameters if reached is None else reached.parameters


def _reach(config: RunConfig, model: ModelShape) -> Reach | None:
    """None for method full, which trains all."""
    return None if config.method == "full" else reach(model, config.lora)


def _shape(config: Mapping[str, Any]) -> ModelShape | None:
    try:
        return ModelShape.from_config(config)
    except UserError:
        return None


def _compute_bytes(config: RunConfig, *, on_gpu: bool) -> int:
    return _STORED_BYTES.get(config.model.compute, 2 if on_gpu else 4)


def _why_stock(config: RunConfig, shape: ModelShape | None, *, on_gpu: bool, processes: int) -> str | None:
    """Why fused regions will not compute the run, as far as it can be told before loading."""
    lora = config.lora
    reasons = {
        "train.fused is off": not config.train.fused,
        "method full trains the weights": config.method == "full",
        "they run on one process": processes > 1,
        "they need a GPU": not on_gpu and not _asks_for_fused(config.memory),
        "model.attention chooses another attention": config.model.attention != "auto",
        "none are known for this kind of model": shape is None or not shape.fused,
        "DoRA rescales whole weights": lora.use_dora,
        "lora_dropout gives each linear an input of its own": lora.lora_dropout > 0,
    }
    if shape is not None and (reached := _reach(config, shape)):
        groups = [{linear.name for linear in projection} for projection in shape.projections]
        torn = any(0 < len(group.intersection(reached.targets)) < len(group) for group in groups)
        reasons |= {
            "an adapter has some of the linears that read one input, and not all": torn,
            f"ranks above {_WIDEST_RANK} are too wide to ride along": reached.rank > _WIDEST_RANK,
        }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _asks_for_fused(memory: MemoryConfig) -> bool:
    """Whether these settings are of what only fused regions do."""
    return bool(memory.activations in ("keep_matmuls", "offload") or memory.span > 1 or memory.mlp_rows)


def require_possible(config: RunConfig, stock: str) -> None:
    """Raise UserError for settings that stock modules cannot carry out; stock: why they compute the run."""
    memory = config.memory
    wanted = {
        f"memory.activations={memory.activations}": memory.activations in ("keep_matmuls", "offload"),
        f"memory.span={memory.span}": memory.span > 1,
        f"memory.mlp_rows={memory.mlp_rows}": memory.mlp_rows > 0,
        f"train.precision={config.train.precision}": config.train.precision == "fp8",
    }
    refused = [setting for setting, asked in wanted.items() if asked]
    if refused:
        fix = "Leave it out, or change what keeps the run from them."
        raise UserError(f"needs fused kernels, and {stock}", where=", ".join(refused), fix=fix)


def _require_on_card(memory: MemoryConfig) -> None:
    elsewhere = {name: getattr(memory, name) for name in _ON_CARD}
    refused = [f"memory.{name}={value}" for name, value in elsewhere.items() if value not in ("auto", _ON_CARD[name])]
    if refused:
        fix = "Leave it out, or train on one GPU."
        raise UserError("is possible on one process only", where=", ".join(refused), fix=fix)


def _num_layers(model: Mapping[str, Any] | ModelShape) -> int:
    if isinstance(model, ModelShape):
        return model.num_layers
    model = model.get("text_config") or model
    return next((model[name] for name in _LAYER_COUNTS if name in model), 1)


def _unplanned(memory: MemoryConfig, num_layers: int) -> MemoryPlan:
    """What needs little memory and costs little, for a model of which nothing can be predicted."""
    policy = LayerPolicy(
        "keep" if memory.activations == "keep" else "recompute",
        "resident" if memory.weights == "auto" else memory.weights,
    )
    return MemoryPlan(
        (policy,) * num_layers,
        embedding="host" if memory.embedding == "host" else "device",
        head="host" if memory.head == "host" else "device",
        moments="paged" if memory.moments == "paged" else "resident",
    )


def _solve(shape: ModelShape, run: RunShape, card: DeviceSpec, fixed: Choices, *, in_files: bool) -> Solution:
    """As `solve`, without streaming from disk unless the checkpoint's files hold the weights as the run does."""
    found = _with_spare(shape, run, card, fixed)
    on_disk = any(policy.weights == "disk" for policy in found.plan.layers)
    if in_files or not on_disk or fixed.weights == "disk":
        return found
    others = [_with_spare(shape, run, card, dataclasses.replace(fixed, weights=held)) for held in _ELSEWHERE]
    best = min(others, key=lambda other: (not other.fits, other.prediction.time.seconds))
    change = Change("memory.weights=disk, from a folder that `nybble quantize` wrote", found.prediction)
    return best if best.fits or not found.fits else dataclasses.replace(best, change=change)


def _with_spare(shape: ModelShape, run: RunShape, card: DeviceSpec, fixed: Choices) -> Solution:
    return dataclasses.replace(solve(shape, run, card, spared(fixed, card)), budget_bytes=_budget_of(fixed, card))


def _budget_of(fixed: Choices, card: DeviceSpec) -> int:
    return min(fixed.budget_bytes or card.memory_bytes, card.memory_bytes)


def spared(fixed: Choices, card: DeviceSpec) -> Choices:
    """With a little less than may be used."""
    budget_bytes = _budget_of(fixed, card)
    spare_bytes = max(_SPARE * budget_bytes, min(_SMALL_SPARE * budget_bytes, _SMALL_SPARE_BYTES))
    return dataclasses.replace(fixed, budget_bytes=int(budget_bytes - spare_bytes))


def _files_hold_weights(config: RunConfig, model: Mapping[str, Any] | ModelShape) -> bool:
    """Whether a checkpoint with this config.json has the frozen weights as the run holds them."""
    quantized = not isinstance(model, ModelShape) and bool(model.get("quantization_config"))
    if config.method == "qlora" or config.model.storage == "nf4":
        return quantized
    return config.model.storage == "auto" and not quantized and not isinstance(model, ModelShape)
