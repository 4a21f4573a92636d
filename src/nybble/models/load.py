"""A checkpoint becomes a model tensor by tensor: read, moved to the device, cast or quantized there, put in place.

Beyond the model itself, the host holds one tensor of the file, or with a GPU the buffers through which tensors pass;
the device holds that tensor. Large ones pass in blocks of 64 MiB.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nybble.adapters.provenance import HeadCodes, Provenance, base_fingerprint
from nybble.errors import UserError, listed
from nybble.models.attention import set_attention
from nybble.models.checkpoint import Checkpoint
from nybble.models.config import ModelConfig
from nybble.models.conversion import Assignment, ParameterMap, kept_in_fp32
from nybble.models.dtypes import DTYPES, dtype_name, resolve_compute
from nybble.models.fp32 import compute_in_fp32
from nybble.models.placement import Placement, Where
from nybble.models.progress import shown
from nybble.models.skeleton import build_skeleton, replace_modules
from nybble.models.tensorfile import BLOCK_BYTES, TensorBlocks
from nybble.plan import MemoryPlan
from nybble.quant.format import NF4Spec
from nybble.quant.linear import DenseEmbedding, DenseLinear, NF4Linear
from nybble.quant.rounding import quantize_searched
from nybble.quant.weight import NF4Weight


class WeightChange(Protocol):
    """What is done to the weights of decoder linears before they are held; see adapters/residual.py."""

    def reaches(self, path: str) -> bool:
        """Whether the weight of the linear at `path` is changed."""
        ...

    def __call__(self, path: str, weight: Tensor) -> Tensor:
        """What is to be held in place of the weight (out, in)."""
        ...


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to train or run, every parameter frozen; `storage` is bf16, fp16, fp32 or nf4."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: ModelConfig
    checkpoint: Checkpoint
    storage: str
    compute_dtype: torch.dtype
    seconds: float
    weight_bytes: int
    change: WeightChange | None = None  # of the weights, since the checkpoint

    @property
    def provenance(self) -> Provenance:
        """What an adapter trained on this model must remember of it."""
        return Provenance(
            base=self.checkpoint.name,
            revision=self.checkpoint.revision,
            base_fingerprint=base_fingerprint(self.checkpoint.folder, self.checkpoint.fingerprint),
            storage=self.storage,  # type: ignore[arg-type]  # one of its four names
            head=self._head_codes(),
            **self._codes(),
        )

    def _head_codes(self) -> HeadCodes | None:
        """Of the head: folders that hold NF4 leave it in 16 bits, so its codes are made by the settings."""
        settings = self.config
        if settings.head != "nf4":
            return None
        return HeadCodes(rounding=settings.rounding, block_size=settings.block_size, double_quant=settings.double_quant)

    def _codes(self) -> dict[str, Any]:
        """Of the linears in NF4: the sizes of their blocks, and how their codes were chosen."""
        if self.storage != "nf4":
            return {}
        # Of the model, not of the settings: a 4-bit checkpoint keeps its own block size.
        head, modules = self.model.get_output_embeddings(), self.model.modules()
        spec = next((held.spec for held in modules if isinstance(held, NF4Linear) and held is not head), None)
        sizes = {"block_size": spec.block_size, "double_quant": spec.double_quant} if spec else {}
        if not self.checkpoint.nf4_weights:
            return {**sizes, "rounding": self.config.rounding}
        recorded = Provenance.read(self.checkpoint.folder)
        chosen = {"rounding": recorded.rounding, "calibration": recorded.calibration} if recorded else {}
        return {**sizes, **chosen, "codes_fingerprint": self.checkpoint.codes_fingerprint}


def load_model(
    config: ModelConfig,
    *,
    device: torch.device,
    storage: str | None = None,
    checkpoint: Checkpoint | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    plan: MemoryPlan | None = None,
    change: WeightChange | None = None,
    progress: bool = False,
) -> LoadedModel:
    """Load the checkpoint `config.name` onto `device`, its weights held as `storage` (default: `config.storage`).

    `auto` keeps what the checkpoint has. Embeddings and routers are never NF4, and the head only where `config.head`
    says so: they stay in the checkpoint's dtype. A bitsandbytes 4-bit checkpoint is taken byte for byte, with its own
    block size.
    `checkpoint`: that of `config`, if it is open already. `tokenizer`: the one to use, if not the checkpoint's own.
    `plan`: weights that it does not have on the device stay in host memory, where those of the blocks are quantized on
    the device first; those on disk stay in the checkpoint's files, mapped, and must be there as they are to be held.
    `change`: of the weights of decoder linears, whole and one at a time, before they are quantized or cast.
    Raises UserError for a checkpoint that is not whole or does not fit its config or plan, before anything is read.
    """
    started = time.perf_counter()
    trusted = config.trust_remote_code
    checkpoint = checkpoint or Checkpoint.open(config.name, config.revision, trust_remote_code=trusted)
    tokenizer = tokenizer or load_tokenizer(checkpoint, trust_remote_code=trusted)
    loader = _Loader(config, checkpoint, device, storage or config.storage, plan, change)
    loader.load(progress=progress)
    return LoadedModel(
        loader.model,
        tokenizer,
        config,
        checkpoint,
        loader.storage,
        loader.compute_dtype,
        time.perf_counter() - started,
        weight_bytes(loader.model),
        change,
    )


def load_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in the checkpoint's folder; raises UserError when there is none."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        what = f"no tokenizer can be read here: {' '.join(str(error).split())}"
        fix = "Fetch the checkpoint again: it needs tokenizer.json and tokenizer_config.json."
        raise UserError(what, where=checkpoint.folder, fix=fix) from error


def quantize_weight(
    name: str, weight: Tensor | TensorBlocks, spec: NF4Spec, rounding: Literal["nearest", "search"] = "nearest"
) -> NF4Weight:
    """Quantize the weight (out, in) called `name` where it lies; raises UserError with the name if it is not finite.

    By search it is held whole: its scales must all be known before the first code is chosen.
    """
    try:
        if rounding == "search":
            whole = weight.map(lambda block: block) if isinstance(weight, TensorBlocks) else weight
            return quantize_searched(whole, spec)
        if isinstance(weight, TensorBlocks):
            return NF4Weight.quantize_blocks(weight.blocks, weight.shape, spec, device=weight.device)
        return NF4Weight.quantize(weight, spec)
    except UserError as error:
        raise UserError(error.what, where=name, fix=error.fix) from None


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones counted once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


class _Loader:
    """One load: what was decided, and the model that is being filled."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        device: torch.device,
        storage: str,
        plan: MemoryPlan | None,
        change: WeightChange | None,
    ) -> None:
        self.checkpoint = checkpoint
        self.change = change
        self.device = device
        self.spec = NF4Spec.of(config.block_size, double_quant=config.double_quant)
        self.rounding = config.rounding
        self.compute_dtype = resolve_compute(config.compute, device)
        self.storage = storage_of(checkpoint) if storage == "auto" else storage
        # Beside NF4, the head and the embeddings keep the dtype of the checkpoint.
        self.kept_dtype = DTYPES.get(self.storage, checkpoint.dtype)
        # Norms and biases are few: in the compute dtype nothing need be cast. Training them needs fp32.
        self.small_dtype = torch.float32 if self.storage == "fp32" else self.compute_dtype
        skeleton = build_skeleton(checkpoint, trust_remote_code=config.trust_remote_code)
        self.model, self.quantizable = skeleton.model, skeleton.quantizable
        set_attention(self.model, config.attention, device)
        self.map = ParameterMap.build(self.model, checkpoint.weights)
        self.map.require_complete(checkpoint.folder)
        _require_shapes(self.model, self.map, checkpoint)
        _require_dense(self.map, checkpoint)
        if change is not None and checkpoint.nf4_weights:
            fix = "Give the 16-bit checkpoint as the model."
            raise UserError(
                "is in 4 bit: a part of the weights cannot be taken out of it", where=checkpoint.folder, fix=fix
            )
        self.placement = Placement.of(self.model, plan)
        replace_modules(self.model, self.compute_dtype)
        self.head = _path_of_head(self.model) if config.head == "nf4" else None
        tied = {*self.map.ties, *self.map.ties.values(), *self.map.duplicates, *self.map.duplicates.values()}
        # One that is tied is the embedding still when the files have been read.
        own_head = {self.head} if self.head is not None and f"{self.head}.weight" not in tied else set()
        self.in_nf4 = (self.quantizable if self.storage == "nf4" else frozenset()) | own_head
        self._require_on_disk()

    def load(self, *, progress: bool) -> None:
        by_keys = {assignment.keys: assignment for assignment in self.map.assignments}
        in_file_order = sorted(by_keys, key=lambda keys: self.checkpoint.position(keys[0]))
        source = {keys: self._source(by_keys[keys]) for keys in in_file_order}
        in_turn: dict[Where, list[str]] = {"device": [], "host": [], "disk": []}
        for keys in in_file_order:
            in_turn[source[keys]] += keys
        blocks, host = self._in_blocks(), torch.device("cpu")
        with (
            contextlib.closing(self.checkpoint.stream(in_turn["device"], self.device, in_blocks=blocks)) as for_device,
            contextlib.closing(self.checkpoint.stream(in_turn["host"], host, in_blocks=blocks)) as for_host,
        ):
            values = {"device": for_device, "host": for_host, "disk": map(self.checkpoint.mapped, in_turn["disk"])}
            for keys in shown(in_file_order, self.checkpoint, "Loading", progress=progress):
                self._fill(by_keys[keys], values[source[keys]])
        tie_parameters(self.model, self.map)
        if self.head is not None:
            self._quantize_tied_head(self.head)
        _require_filled(self.model, self.checkpoint)
        _move_buffers(self.model, self.device)
        if self.small_dtype != self.compute_dtype:
            compute_in_fp32(self.model, self.compute_dtype)
        self.model.config.dtype = self.compute_dtype
        self.model.requires_grad_(False).eval()

    def _source(self, assignment: Assignment) -> Where:
        """Where its tensors are read to: to the device too what it is to change before it goes elsewhere."""
        path, _, leaf = assignment.parameters[0].rpartition(".")
        is_weight = leaf == "weight" and isinstance(self.model.get_submodule(path), DenseLinear | DenseEmbedding)
        changes = not assignment.is_rename or self._changes_format(assignment.keys[0], path)
        return self.placement.at(path) if is_weight and not changes else "device"

    def _changes_format(self, key: str, path: str) -> bool:
        if key in self.checkpoint.nf4_weights:
            return self.storage != "nf4"
        return path in self.in_nf4 or self._is_changed(path)

    def _is_changed(self, path: str) -> bool:
        return self.change is not None and path in self.quantizable and self.change.reaches(path)

    def _require_on_disk(self) -> None:
        """Raise UserError if weights that are to stay in the files are not there as they are to be held."""
        found = [(name.rpartition(".")[0], entry) for entry in self.map.assignments for name in entry.parameters]
        on_disk = [(path, entry) for path, entry in found if self.placement.at(path) == "disk"]
        linears = [(path, entry) for path, entry in on_disk if isinstance(self.model.get_submodule(path), DenseLinear)]
        problems = [path for path, entry in linears if not self._is_held_in_file(path, entry)]
        if problems:
            what = listed(f"these weights are not in {self.storage} in the checkpoint's files:", problems, most=3)
            fix = "Write a folder that has them with `nybble quantize`, and train from it; or use streamed."
            raise UserError(what, where="memory.weights=disk", fix=fix)

    def _is_held_in_file(self, path: str, assignment: Assignment) -> bool:
        if assignment.parameters[0].endswith(".bias"):
            return True  # it is read
        key, module = assignment.keys[0], self.model.get_submodule(path)
        same_dtype = key in self.checkpoint.nf4_weights or self.checkpoint.entries[key].dtype == self.kept_dtype
        return self._source(assignment) == "disk" and same_dtype and not module.fan_in_fan_out

    def _in_blocks(self) -> set[str]:
        """The weights that can be placed block by block: neither joined with others nor transposed."""
        return {
            key
            for key, name in self.map.parameter_of.items()
            if key not in self.checkpoint.nf4_weights
            and not getattr(self.model.get_submodule(name.rpartition(".")[0]), "fan_in_fan_out", False)
            and not self._is_changed(name.rpartition(".")[0])
        }

    def _fill(self, assignment: Assignment, values: Iterator[Tensor | TensorBlocks | NF4Weight]) -> None:
        read = [next(values) for _ in assignment.keys]
        if assignment.is_rename:
            self._place(assignment.parameters[0], read[0])
            return
        dense = [value for value in read if isinstance(value, Tensor)]  # all of them, see _require_dense
        for name, value in assignment.apply(dense, self.model).items():
            self._place(name, value)

    def _place(self, name: str, value: Tensor | TensorBlocks | NF4Weight) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if isinstance(module, DenseLinear) and leaf == "weight":
            self._place_linear(path, module, value)
        elif isinstance(value, NF4Weight):
            raise UserError(f"{name} is in 4 bit, but not the weight of a linear layer", where=self.checkpoint.folder)
        elif leaf in dict(module.named_buffers(recurse=False)):
            setattr(module, leaf, self._cast(name, value, self.small_dtype))
        else:
            dtype = self.kept_dtype if isinstance(module, DenseEmbedding) else self._small_dtype_of(name)
            setattr(module, leaf, self._frozen(path, self._cast(name, value, dtype)))

    def _place_linear(self, path: str, module: DenseLinear, value: Tensor | TensorBlocks | NF4Weight) -> None:
        if isinstance(value, NF4Weight):
            value = value if self.storage == "nf4" or path in self.in_nf4 else value.dequantize(self.kept_dtype)
        else:
            if isinstance(value, Tensor) and module.fan_in_fan_out:
                value = value.t().contiguous()
            if self.change is not None and self._is_changed(path):
                assert isinstance(value, Tensor)  # see _in_blocks
                value = self.change(path, value)
            if path in self.in_nf4:
                value = quantize_weight(path, value, self.spec, self.rounding)
        if tuple(value.shape) != tuple(module.weight.shape):
            raise UserError(f"{path} has shape {tuple(value.shape)}, not {tuple(module.weight.shape)}")
        if isinstance(value, NF4Weight):
            bias, transposed = module.bias, module.fan_in_fan_out
            value = value.to("cpu") if self.placement.at(path) == "host" else value
            ours = NF4Linear(value, bias, self.compute_dtype, fan_in_fan_out=transposed)
            self.model.set_submodule(path, ours)
        else:
            module.weight = self._frozen(path, self._cast(path, value, self.kept_dtype))

    def _quantize_tied_head(self, path: str) -> None:
        """Part the head from its embedding, which stays as it is.

        In host memory, from where rows are looked up, the embedding takes nothing of the device.
        """
        head = self.model.get_submodule(path)
        if isinstance(head, NF4Linear):
            return
        assert isinstance(head, DenseLinear)
        weight = head.weight.detach()
        step = BLOCK_BYTES // (weight.element_size() * self.spec.block_size) * self.spec.block_size
        blocks = TensorBlocks(
            tuple(weight.shape),
            self.device,
            (block.to(self.device) for block in torch.split(weight.view(-1), step)),
        )
        quantized = quantize_weight(path, blocks, self.spec, self.rounding)
        self.model.set_submodule(path, NF4Linear(quantized, head.bias, self.compute_dtype))
        self.model.config.tie_word_embeddings = False

    def _frozen(self, path: str, value: Tensor) -> nn.Parameter:
        """A parameter of the module at `path`, where it is to lie. Vectors are few, and read outside their modules."""
        on_host = value.dim() > 1 and self.placement.at(path) == "host"
        return nn.Parameter(value.cpu() if on_host else value, requires_grad=False)

    def _small_dtype_of(self, name: str) -> torch.dtype:
        return torch.float32 if kept_in_fp32(self.model, name, self.small_dtype) else self.small_dtype

    def _cast(self, name: str, value: Tensor | TensorBlocks, dtype: torch.dtype) -> Tensor:
        if isinstance(value, TensorBlocks):
            return value.map(lambda block: self._cast(name, block, dtype))
        if not value.is_floating_point():
            return value
        cast = value.to(dtype)
        if dtype == torch.float16 and not bool(cast.isfinite().all()):
            fix = "Use storage and compute bf16 or fp32."
            raise UserError(f"{name} has values beyond fp16's 65504", where=self.checkpoint.folder, fix=fix)
        return cast


def tie_parameters(model: PreTrainedModel, names: ParameterMap) -> None:
    """Make tied parameters one object, also where the file has both and they are equal."""
    for target, source in names.ties.items():
        path, _, leaf = target.rpartition(".")
        setattr(model.get_submodule(path), leaf, model.get_parameter(source))
    for target, source in names.duplicates.items():
        path, _, leaf = target.rpartition(".")
        one, other = model.get_parameter(target), model.get_parameter(source)
        if torch.equal(one, other.to(one.device)):
            setattr(model.get_submodule(path), leaf, model.get_parameter(source))
        else:
            model.config.tie_word_embeddings = False  # as Transformers does: what is in the file wins


def _path_of_head(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    if not isinstance(head, DenseLinear):
        raise UserError(f"{type(model).__name__} has no head that NF4 can hold", where="model.head", fix="Use 16bit.")
    found: str = next(path for path, module in model.named_modules() if module is head)
    return found


def storage_of(checkpoint: Checkpoint) -> str:
    return "nf4" if checkpoint.nf4_weights else dtype_name(checkpoint.dtype)


def _require_shapes(model: PreTrainedModel, names: ParameterMap, checkpoint: Checkpoint) -> None:
    expected = model.state_dict()
    problems = []
    for key, parameter in names.parameter_of.items():
        found, wanted = checkpoint.entries[key].shape, tuple(expected[parameter].shape)
        if key not in checkpoint.nf4_weights and found != wanted:
            problems.append(f"{key} has shape {found}, config.json asks for {wanted}")
    if problems:
        what = listed("the weights do not fit the model that config.json describes:", problems, most=8)
        raise UserError(what, where=checkpoint.folder)


def _require_dense(names: ParameterMap, checkpoint: Checkpoint) -> None:
    merged = [key for assignment in names.assignments if not assignment.is_rename for key in assignment.keys]
    quantized = [key for key in merged if key in checkpoint.nf4_weights]
    if quantized:
        what = f"holds in 4 bit what the model merges: {', '.join(quantized[:3])}"
        raise UserError(what, where=checkpoint.folder, fix="Use the model's 16-bit checkpoint.")


def _require_filled(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise UserError(f"parameters that no tensor filled: {', '.join(empty[:6])}", where=checkpoint.folder)


def _move_buffers(model: PreTrainedModel, device: torch.device) -> None:
    for module in model.modules():
        for leaf, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, leaf, buffer.to(device))
