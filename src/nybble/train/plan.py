"""How a run will hold what it needs: decided from its settings and the model's config.json, before anything is loaded.

Nothing here imports torch, so that `nybble plan` answers at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nybble.config import RunConfig
from nybble.errors import UserError
from nybble.memory.config import MemoryConfig
from nybble.plan import LayerPolicy, MemoryPlan
from nybble.planner.candidates import Choices
from nybble.planner.cards import DeviceSpec
from nybble.planner.prediction import Prediction
from nybble.planner.reach import Reach, reach
from nybble.planner.run_shape import RunShape
from nybble.planner.shapes import ModelShape
from nybble.planner.solve import Change, Solution, solve
from nybble.planner.words import figures, fit_lines, in_one_line
from nybble.quant.format import NF4Spec

# A prediction is within 5 % of what is measured: what is predicted to exceed the budget by less may fit.
TOLERANCE = 1.05
# Predictions may be so much too low: under a budget of 2.5 GiB steps ran out that were predicted to take 2.46.
_SPARE, _SMALL_SPARE, _SMALL_SPARE_BYTES = 0.02, 0.04, 100 * 2**20
_STORED_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_WIDEST_RANK = 128  # that fused regions take
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # as config.json has it
# Of several processes each has all on its own card.
_ON_CARD: dict[str, Any] = {"weights": "resident", "embedding": "device", "head": "device", "moments": "resident"}
_OF_FUSED = ("keep_matmuls", "keep_on_host", "offload")  # ways to hold activations that fused regions alone have
_SHORTEST = 256  # tokens: rows are not advised to be cut to fewer

Model = Mapping[str, Any] | ModelShape  # config.json, or the shape itself


@dataclass(frozen=True)
class Rows:
    """The longest rows of a run: tokens in training and in evaluation (0: there is none), most samples in one."""

    seq_len: int
    evaluation_len: int = 0
    samples: int = 1

    def cut(self, length: int) -> Rows:
        """As data.max_length would."""
        return replace(self, seq_len=min(self.seq_len, length), evaluation_len=min(self.evaluation_len, length))


@dataclass(frozen=True)
class RunPlan:
    """What a run does about memory.

    stock: why stock modules compute it, None if fused regions do. solution: how the planner came to it; None for a
    model whose sizes it does not know. required: what of the plan was not to be chosen; fixed: with what the settings
    say. on_gpu: on a CPU a prediction is good for choosing between plans only.
    """

    memory: MemoryPlan
    card: DeviceSpec
    stock: str | None
    shape: ModelShape | None = None
    solution: Solution | None = None
    required: Choices = field(default_factory=Choices)
    fixed: Choices = field(default_factory=Choices)
    on_gpu: bool = True

    @property
    def prediction(self) -> Prediction | None:
        """What to expect, where it can be told."""
        return self.solution.prediction if self.solution is not None and self.on_gpu else None

    @property
    def most_tokens(self) -> int:
        """Of a micro-batch; 0 if that is not known."""
        return 0 if self.solution is None else self.solution.run.tokens

    def lines(self) -> list[str]:
        """For printing, before anything is loaded."""
        plan = f"plan: {in_one_line(self.memory)}"
        if not self.on_gpu:
            return [plan]
        return [plan, *fit_lines(self.solution)] if self.solution else [f"{plan} (nothing is predicted for this model)"]

    def require_fit(self) -> None:
        """Raise UserError if the run is predicted to need more than there is; on a CPU, than it was given."""
        solution, limited = self.solution, self.on_gpu or self.fixed.budget_bytes is not None
        if solution is not None and limited and solution.prediction.peak_bytes > TOLERANCE * solution.budget_bytes:
            what, *rest = fit_lines(solution)
            raise UserError(f"the run does not fit: {what}", where="memory", fix="\n".join(rest) or None)

    def smaller(self, budget_bytes: int) -> str | None:
        """The plan for a smaller budget, with nothing fixed that can be chosen, in words; None if none fits there."""
        if self.solution is None or self.shape is None:
            return None
        fixed = replace(self.required, budget_bytes=budget_bytes)
        found = _within_budget(self.shape, self.solution.run, self.card, fixed)
        return f"{in_one_line(found.plan)} ({figures(found.prediction)})" if found.fits else None


def plan_run(
    config: RunConfig, model: Model, card: DeviceSpec, *, rows: Rows, on_gpu: bool = True, processes: int = 1
) -> RunPlan:
    """The plan of a run on `card`, whose memory is what it may have unless `memory.budget` is less.

    Raises UserError for settings of memory that cannot be carried out.
    """
    shape = model if isinstance(model, ModelShape) else shape_of(model)
    reached = None if shape is None else reach(shape, config.lora)
    not_fused = _why_not_fused(config, shape, reached, on_gpu=on_gpu, processes=processes)
    stock = "method full trains the weights" if config.method == "full" else not_fused
    if stock is not None:
        require_possible(config, stock)
    if processes > 1:
        _require_on_card(config.memory)
    sharded = processes > 1 and config.train.distributed == "fsdp2"
    if shape is None or reached is None or sharded:
        return RunPlan(unplanned(config.memory, num_layers_of(model)), card, stock, on_gpu=on_gpu)
    compute_bytes = _STORED_BYTES.get(config.model.compute, 2 if on_gpu else 4)
    case = _Case(model, shape, reached, card, processes, fused=not_fused is None, compute_bytes=compute_bytes)
    solution, required = case.solution(config, rows), case.required(config)
    if not solution.fits:
        solution = replace(solution, change=case.smallest_change(config, rows))
    fixed = choices(config, shape, required)
    return RunPlan(solution.plan, card, stock, shape, solution, required, fixed, on_gpu=on_gpu)


@dataclass(frozen=True)
class _Case:
    """What a plan follows from beside settings and rows, and none of the changes that are advised alters.

    reached: by the adapter. fused: whether fused regions compute a run with one.
    """

    model: Model
    shape: ModelShape
    reached: Reach
    card: DeviceSpec
    processes: int
    fused: bool
    compute_bytes: int

    def solution(self, config: RunConfig, rows: Rows) -> Solution:
        shape, given = self.shape, choices(config, self.shape, self.required(config))
        run = run_shape(
            config,
            shape,
            rows,
            self.reached,
            quantized=is_quantized(self.model),
            fused=self.fused,
            compute_bytes=self.compute_bytes,
        )
        return _within_budget(shape, run, self.card, given)

    def required(self, config: RunConfig) -> Choices:
        in_files = _files_hold_weights(config, self.model)
        return required(config, self.reached, processes=self.processes, in_files=in_files)

    def smallest_change(self, config: RunConfig, rows: Rows) -> Change | None:
        """The first of some changes, the smallest first, that makes the run fit."""
        for settings in self._changes(config, rows):
            found = self.solution(config.changed(settings), rows.cut(settings.get("data.max_length", rows.seq_len)))
            if found.fits:
                said = " ".join(f"{name}={str(value).lower()}" for name, value in settings.items())
                from_folder = ", from a folder that `nybble quantize` wrote" if "memory.weights" in settings else ""
                return Change(said + from_folder, found.prediction)
        return None

    def _changes(self, config: RunConfig, rows: Rows) -> Iterator[dict[str, Any]]:
        """Smaller micro-batches, no graph and layers on disk, which compute the same; then with the smallest
        micro-batches what costs little of what is learnt, bit by bit.
        """
        train, alone, quantized = config.train, self.processes == 1, is_quantized(self.model)
        in_nf4 = _storage(config, quantized=quantized) == "nf4"
        total, changed = train.batch_size * train.gradient_accumulation, dict[str, Any]()
        for batch in range(train.batch_size - 1, 0, -1):
            if total % batch == 0:
                changed = {"train.batch_size": batch, "train.gradient_accumulation": total // batch}
                yield changed
        if train.cuda_graph and self.fused and config.method != "full":
            changed = changed | {"train.cuda_graph": False}
            yield changed
        if in_nf4 and not quantized and alone and config.memory.weights == "auto":
            yield changed | {"memory.weights": "disk"}
        held = {} if config.model.storage == "auto" else {"model.storage": "auto"}
        steps: list[tuple[bool, dict[str, Any]]] = [
            (alone and config.optim.state_bits == 32, {"optim.state_bits": 8}),
            (config.method == "full", {"method": "lora", **held}),
            (not in_nf4, {"method": "qlora", **held}),
        ]
        for helps, step in steps:
            if helps:
                changed = changed | step
                yield changed
        length = rows.seq_len
        while length > _SHORTEST:
            length //= 2
            yield changed | {"data.max_length": length}


def run_shape(
    config: RunConfig,
    model: ModelShape,
    rows: Rows,
    reached: Reach,
    *,
    quantized: bool = False,
    fused: bool = True,
    compute_bytes: int = 2,
) -> RunShape:
    """The sizes of a run with these settings over `model`.

    quantized: whether the checkpoint is. fused: whether fused regions compute the run under an adapter.
    """
    train, storage = config.train, _storage(config, quantized=quantized)
    storage_bytes = _STORED_BYTES.get(storage, model.dtype_bytes)
    return RunShape(
        method="qlora" if storage == "nf4" else config.method,
        targets=reached.targets,
        rank=reached.rank,
        batch=train.batch_size,
        seq_len=rows.seq_len,
        accumulation=train.gradient_accumulation,
        samples_a_row=rows.samples,
        precision=train.precision,
        state_bits=config.optim.state_bits,
        nf4=NF4Spec.of(config.model.block_size, double_quant=config.model.double_quant),
        storage_bytes=storage_bytes,
        nf4_head=config.model.head == "nf4",
        compute_bytes=compute_bytes,
        trained_bytes=storage_bytes if config.method == "full" else _STORED_BYTES[config.lora.dtype],
        cuda_graph=train.cuda_graph,
        fused=fused,
        deterministic=train.deterministic,
        evaluation_len=rows.evaluation_len,
    )


def required(config: RunConfig, reached: Reach, *, processes: int = 1, in_files: bool = True) -> Choices:
    """What of a plan is no choice: what is trained, and a head in NF4, lies on the card."""
    if processes > 1:
        return Choices(**_ON_CARD, in_files=in_files)
    full = config.method == "full"
    ends = full or reached.ends_trained
    return Choices(
        weights="resident" if full else "auto",
        embedding="device" if ends else "auto",
        head="device" if ends or config.model.head == "nf4" else "auto",
        in_files=in_files,
    )


def choices(config: RunConfig, model: ModelShape, required: Choices) -> Choices:
    """What is `required` of the plan, and what the settings fix; raises UserError where one excludes the other."""
    memory, in_nf4 = config.memory, config.model.head == "nf4"
    if in_nf4 and memory.head == "host":
        fix = "Use device, where it takes a quarter, or model.head=16bit."
        raise UserError("a head in NF4 lies on the device", where="memory.head", fix=fix)
    for name in ("weights", "embedding", "head"):
        only, asked = getattr(required, name), getattr(memory, name)
        if "auto" not in (only, asked) and only != asked:
            fix = f"Use {only}, or leave it out of what is trained."
            raise UserError("what is trained cannot lie in host memory", where=f"memory.{name}", fix=fix)
    if model.tied and not in_nf4 and {memory.embedding, memory.head} == {"device", "host"}:
        what = "this model's embedding and head are one matrix, which cannot lie in two places"
        raise UserError(what, where="memory.embedding, memory.head", fix="Give both the same place.")
    given = {name: value for name, value in memory.model_dump(exclude={"budget"}).items() if value not in ("auto", 0)}
    return replace(required, **given, budget_bytes=memory.budget_bytes)


def trained_parameters(config: RunConfig, model: ModelShape) -> int:
    """How many parameters train, exactly."""
    return model.parameters if config.method == "full" else reach(model, config.lora).parameters


def _storage(config: RunConfig, *, quantized: bool) -> str:
    """How frozen weights are held, as far as it can be told; quantized: whether the checkpoint's are.

    `nybble.models.dtypes.resolve_storage` without torch, and what the loader makes of `auto`.
    """
    of_method = {"qlora": "nf4", "full": "fp32", "lora": "nf4" if quantized else "auto"}
    return of_method[config.method] if config.model.storage == "auto" else config.model.storage


def shape_of(config: Mapping[str, Any]) -> ModelShape | None:
    """The sizes of the model with this config.json; None if they are not known."""
    try:
        return ModelShape.from_config(config)
    except UserError:
        return None


def _why_not_fused(
    config: RunConfig, shape: ModelShape | None, reached: Reach | None, *, on_gpu: bool, processes: int
) -> str | None:
    """Why fused regions would not compute the run under an adapter, as far as it can be told before loading."""
    lora = config.lora
    reasons = {
        "train.fused is off": not config.train.fused,
        "they run on one process": processes > 1,
        "they need a GPU": not on_gpu and not _asks_for_fused(config.memory),
        "model.attention chooses another attention": config.model.attention != "auto",
        "none are known for this kind of model": shape is None or not shape.fused,
        "DoRA rescales whole weights": lora.use_dora,
        "lora_dropout gives each linear an input of its own": lora.lora_dropout > 0,
    }
    if shape is not None and reached is not None:
        groups = [{linear.name for linear in projection} for projection in shape.projections]
        torn = any(0 < len(group.intersection(reached.targets)) < len(group) for group in groups)
        reasons |= {
            "an adapter has some of the linears that read one input, and not all": torn,
            f"ranks above {_WIDEST_RANK} are too wide to ride along": reached.rank > _WIDEST_RANK,
        }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _asks_for_fused(memory: MemoryConfig) -> bool:
    """Whether these settings are of what only fused regions do."""
    return bool(memory.activations in _OF_FUSED or memory.span > 1 or memory.mlp_rows)


def require_possible(config: RunConfig, stock: str) -> None:
    """Raise UserError for settings that stock modules cannot carry out; stock: why they compute the run."""
    memory = config.memory
    wanted = {
        f"memory.activations={memory.activations}": memory.activations in _OF_FUSED,
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


def num_layers_of(model: Model) -> int:
    """1 if nothing says how many."""
    if isinstance(model, ModelShape):
        return model.num_layers
    model = model.get("text_config") or model
    return next((model[name] for name in _LAYER_COUNTS if name in model), 1)


def unplanned(memory: MemoryConfig, num_layers: int) -> MemoryPlan:
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


def _within_budget(shape: ModelShape, run: RunShape, card: DeviceSpec, fixed: Choices) -> Solution:
    return replace(solve(shape, run, card, spared(fixed, card)), budget_bytes=budget_of(fixed, card))


def budget_of(fixed: Choices, card: DeviceSpec) -> int:
    return min(fixed.budget_bytes or card.memory_bytes, card.memory_bytes)


def spared(fixed: Choices, card: DeviceSpec) -> Choices:
    """With a little less than may be used."""
    budget_bytes = budget_of(fixed, card)
    spare_bytes = max(_SPARE * budget_bytes, min(_SMALL_SPARE * budget_bytes, _SMALL_SPARE_BYTES))
    return replace(fixed, budget_bytes=int(budget_bytes - spare_bytes))


def is_quantized(model: Model) -> bool:
    return not isinstance(model, ModelShape) and bool(model.get("quantization_config"))


def _files_hold_weights(config: RunConfig, model: Model) -> bool:
    """Whether a checkpoint with this config.json has the frozen weights as the run holds them."""
    if _storage(config, quantized=is_quantized(model)) == "nf4":
        return is_quantized(model)
    return config.model.storage == "auto" and not isinstance(model, ModelShape)
