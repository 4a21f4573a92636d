"""Adapters on disk as PEFT writes them: adapter_config.json, adapter_model.safetensors, and nybble.json beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nybble.adapters.config import LoraConfig
from nybble.adapters.inject import adapter_config, adapter_slots, add_adapter, set_adapter
from nybble.adapters.lora import AdapterSlot, LoRAAdapter, LoRALinear, is_frozen_linear
from nybble.adapters.modules_to_save import TrainableCopy
from nybble.adapters.names import left_out, matches
from nybble.adapters.peft_format import (
    BASE_COPY,
    CONFIG_FILE,
    LORA_A,
    LORA_B,
    MAGNITUDE,
    PREFIX,
    TENSORS_FILE,
    peft_config,
    split_name,
    whole_name,
)
from nybble.adapters.provenance import Provenance
from nybble.adapters.saved import (
    LowRankPair,
    SavedAdapter,
    check_base,
    is_copy,
    non_finite,
    read_adapter,
)
from nybble.adapters.start import AdapterStart
from nybble.adapters.targets import (
    Targets,
    is_linear,
    module_paths,
    shortest_names,
    wanted_linears,
)
from nybble.errors import UserError, listed
from nybble.files import atomic_folder, write_json
from nybble.quant.linear import NF4Linear
from nybble.sharded import full_tensor, sharded_like

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def save_adapter(
    model: nn.Module,
    folder: Path,
    *,
    name: str = "default",
    provenance: Provenance,
    start: AdapterStart | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    replace: bool = False,
    write: bool = True,
) -> None:
    """Write the adapter as PEFT would, whole or not at all, and compare what can be read back with what is held.

    start: where the adapter began, written beside it if that was not at zero.
    With FSDP2 every process calls this, since the tensors are gathered, and all but one with `write=False`.
    Raises UserError for an empty or non-finite adapter, and when the folder exists and `replace` is not set.
    """
    tensors = adapter_tensors(model, name)
    if not write:
        return
    _refuse_broken(folder, tensors)
    with atomic_folder(folder, replace=replace) as aside:
        write_json(aside / CONFIG_FILE, _config_values(model, name, provenance))
        save_file(tensors, aside / TENSORS_FILE, metadata={"format": "pt"})
        provenance.write(aside)
        if start is not None:
            start.write(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        _compare(folder, tensors, load_file(aside / TENSORS_FILE))


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str = "default",
    trainable: bool = False,
    base_fingerprint: str | None = None,
) -> SavedAdapter:
    """Put a saved adapter on `model` and make it active; its layers are those that the file has tensors for.

    `base_fingerprint`: that of the checkpoint under `model`, to be compared with the one it was trained on.
    Raises UserError, before the model is touched, for tensors that do not fit and for another base.
    """
    saved = read_adapter(folder)
    check_base(saved, base_fingerprint)
    if saved.provenance is not None and saved.provenance.residual_fingerprint and not saved.provenance.difference:
        what = f"belongs to a base that its start ({saved.provenance.init}) was taken out of, not to this model"
        fix = "Give it to `nybble chat` or `eval`, which take that out while loading, or save it as a difference."
        raise UserError(what, where=saved.folder, fix=fix)
    attach_adapter(model, saved, name=name, trainable=trainable)
    return saved


def attach_adapter(
    model: nn.Module,
    saved: SavedAdapter,
    *,
    name: str = "default",
    trainable: bool = False,
    device: torch.device | None = None,
) -> None:
    """As `load_adapter`, for an adapter that was read already and is known to be of this base.

    device: where low-rank pairs lie, None: where the weights do that they change.
    """
    _require_corrected_base(model, saved)
    add_adapter(model, saved.config, _saved_targets(model, saved), name=name, device=device)
    set_adapter_tensors(model, saved.tensors, name=name)
    for _, slot in adapter_slots(model):
        if name in slot.adapters:
            slot.adapters[name].trainable = trainable  # type: ignore[assignment]
    set_adapter(model, name)


def adapter_tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors on the CPU by PEFT's names, sorted. Under FSDP2 all processes must call it."""
    return {key: place.read() for key, place in sorted(_places(model, name).items())}


def set_adapter_tensors(model: nn.Module, tensors: Mapping[str, Tensor], *, name: str = "default") -> None:
    """Copy tensors, by PEFT's names, into the adapter; raises UserError unless exactly its own are given."""
    places = _places(model, name)
    given = {_canonical(key): tensor for key, tensor in tensors.items() if BASE_COPY not in key}
    problems = [f"{key} is missing" for key in places if key not in given]
    problems += [f"{key} has no place" for key in given if key not in places]
    problems += [
        f"{key} is {tuple(given[key].shape)}, not {place.shape}"
        for key, place in places.items()
        if key in given and tuple(given[key].shape) != place.shape
    ]
    if problems:
        raise UserError(
            listed("the tensors are not those of the adapter:", problems, most=8), where=f"adapter {name!r}"
        )
    for key, place in places.items():
        place.write(given[key])


def _require_corrected_base(model: nn.Module, saved: SavedAdapter) -> None:
    """Raise UserError if the adapter corrects NF4's error, and no weight that it adapts is in NF4."""
    trained_on = saved.provenance
    if trained_on is None or trained_on.init not in ("calibrated", "loftq") or trained_on.difference:
        return
    slots = {path: module.base if isinstance(module, AdapterSlot) else module for path, module in module_paths(model)}
    if not any(isinstance(slots.get(path), NF4Linear) for path in saved.pairs):
        what = "corrects the error of NF4 weights, which this model has none of"
        fix = "Use it with model.storage nf4, or save it as a difference."
        raise UserError(what, where=saved.folder, fix=fix)


@dataclass(frozen=True)
class _Place:
    """A parameter, and whether the file holds it transposed, as GPT-2's Conv1D holds its weight."""

    parameter: nn.Parameter
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.parameter.shape)
        return shape[::-1] if self.transposed else shape

    def read(self) -> Tensor:
        value = full_tensor(self.parameter.detach())
        return (value.T if self.transposed else value).cpu().contiguous()

    @torch.no_grad()
    def write(self, value: Tensor) -> None:
        self.parameter.copy_(sharded_like(value.T if self.transposed else value, self.parameter))


def _places(model: nn.Module, name: str) -> dict[str, _Place]:
    """Where each of the adapter's tensors is held, by PEFT's name for it."""
    places: dict[str, _Place] = {}
    for path, slot in adapter_slots(model):
        part = dict(slot.adapters.items()).get(name)
        if isinstance(part, LoRAAdapter):
            places |= {f"{PREFIX}{path}.{LORA_A}": _Place(part.lora_A), f"{PREFIX}{path}.{LORA_B}": _Place(part.lora_B)}
            if part.magnitude is not None:
                places[f"{PREFIX}{path}.{MAGNITUDE}"] = _Place(part.magnitude)
        elif isinstance(part, TrainableCopy):
            for key, parameter in part.module.named_parameters():
                places[f"{PREFIX}{path}.{key}"] = _Place(parameter, key == "weight" and _is_transposed(part.module))
    if not places:
        raise UserError(f"the model has no adapter {name!r}", where="adapter")
    return places


def _is_transposed(module: nn.Module) -> bool:
    return bool(getattr(module, "fan_in_fan_out", False))


def _canonical(name: str) -> str:
    """PEFT's name of today for a tensor that may have an older one."""
    split = split_name(name)
    return PREFIX + (".".join(split) if split is not None else whole_name(name))


def _saved_targets(model: nn.Module, saved: SavedAdapter) -> Targets:
    """The layers that the file has tensors for; raises UserError, naming tensors, unless all of them fit `model`."""
    modules: dict[str, Any] = {
        path: module.base if isinstance(module, AdapterSlot) else module for path, module in module_paths(model)
    }
    problems = [
        problem for path, pair in saved.pairs.items() if (problem := _pair_misfit(path, pair, modules.get(path)))
    ]
    whole = sorted({name.rpartition(".")[0] for name in saved.whole})
    held = {f"{path}.{key}": tensor for path in whole if path in modules for key, tensor in _file_shapes(modules[path])}
    problems += [f"{key}: the adapter has no such tensor" for key in held if key not in saved.whole]
    problems += [
        f"{key}: {tuple(tensor.shape)} in the adapter, {held.get(key, 'nothing')} in the model"
        for key, tensor in saved.whole.items()
        if held.get(key) != tuple(tensor.shape)
    ]
    problems += [
        f"{key}: the adapter has another weight for the base than the model"
        for key, copy in saved.base_copies.items()
        if (base := modules.get(key.rpartition(".")[0])) is None or not is_copy(base.weight, copy)
    ]
    lacking = [path for path in wanted_linears(model, saved.config) if path not in saved.pairs]
    problems += [f"{path}: named by {CONFIG_FILE}, without tensors in the file" for path in lacking]
    if problems:
        what = listed(f"{len(problems)} tensors do not fit this model:", problems, most=8)
        raise UserError(what, where=saved.folder / TENSORS_FILE, fix="Was it trained on another base?")
    return Targets(tuple(path for path in modules if path in saved.pairs), tuple(whole))


def _pair_misfit(path: str, pair: LowRankPair, base: Any) -> str | None:
    if base is None or not is_linear(base):
        return f"{path}: the model has no such linear layer"
    ours, theirs = (base.out_features, base.in_features), (pair.B.shape[0], pair.A.shape[1])
    return None if ours == theirs else f"{path}: the adapter is for {theirs} (out, in), the model has {ours}"


def _file_shapes(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the weights of a module as the adapter's file would hold them."""
    if is_frozen_linear(module):
        shape = (module.out_features, module.in_features)
        yield "weight", shape[::-1] if module.fan_in_fan_out else shape
        if module.bias is not None:
            yield "bias", (module.out_features,)
        return
    for key, parameter in module.named_parameters():
        yield key, tuple(parameter.shape)


def _config_values(model: nn.Module, name: str, provenance: Provenance) -> dict[str, Any]:
    config = adapter_config(model, name)
    paths = [path for path, _ in module_paths(model)]
    slots = {path: slot for path, slot in adapter_slots(model) if name in slot.adapters}
    linears = [path for path, slot in slots.items() if isinstance(slot, LoRALinear)]
    return peft_config(
        config,
        base=provenance.base,
        revision=provenance.revision,
        target_modules=_names_for_peft(config, linears, paths),
        modules_to_save=shortest_names([path for path in slots if path not in linears], paths, boundary=""),
        fan_in_fan_out=any(_is_transposed(slots[path].base) for path in linears),
    )


def _names_for_peft(config: LoraConfig, linears: list[str], paths: list[str]) -> str | tuple[str, ...]:
    """The user's own names or expression where PEFT would find the same layers by them, else the shortest names."""
    said = config.target_modules
    found = [path for path in paths if matches(said, path) and not left_out(config, path)]
    return said if found == linears else shortest_names(linears, paths)


def _refuse_broken(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    problems = [f"{key} is empty" for key, tensor in tensors.items() if tensor.numel() == 0]
    problems += [f"{key} holds NaN or infinite values" for key in non_finite(tensors)]
    if problems:
        raise UserError(listed("the adapter is broken and was not saved:", problems, most=8), where=folder)


def _compare(folder: Path, held: Mapping[str, Tensor], written: Mapping[str, Tensor]) -> None:
    differing = [key for key in held if key not in written or not torch.equal(held[key], written[key])]
    if differing:
        what = listed("what was written is not what was held:", differing, most=8)
        raise UserError(what, where=folder, fix="Check the disk.")
