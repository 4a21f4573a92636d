"""Putting adapters beside the layers of a loaded model, and choosing among them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch
from torch import nn

from nybble.adapters.config import LoraConfig
from nybble.adapters.lora import AdapterSlot, LoRAAdapter, LoRALinear, layer_generator
from nybble.adapters.modules_to_save import ModulesToSave, TrainableCopy
from nybble.adapters.report import InjectionReport, report_injection
from nybble.adapters.targets import Targets, find_targets, module_paths
from nybble.errors import UserError


def inject(
    model: nn.Module,
    config: LoraConfig,
    *,
    name: str = "default",
    seed: int = 0,
    device: torch.device | None = None,
) -> InjectionReport:
    """Add a fresh adapter to `model` and make it the active one; all else is frozen.

    Every layer draws its A from a generator of its own, made from `seed` and the layer's path: the same layer starts
    from the same numbers whatever else is adapted. Low-rank pairs lie on `device`, None: where the weights do that they
    adapt. Raises UserError when a name or pattern of `config` matches nothing.
    """
    return add_adapter(model, config, find_targets(model, config), name=name, seed=seed, device=device)


def add_adapter(
    model: nn.Module,
    config: LoraConfig,
    targets: Targets,
    *,
    name: str,
    seed: int = 0,
    device: torch.device | None = None,
) -> InjectionReport:
    """As `inject`, for targets that were found already."""
    _check_name(model, name)
    _check_slots(model, targets)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for path in targets.linears:
        slot = _slot(model, path, LoRALinear)
        adapter = LoRAAdapter(slot.base, config, path, device)  # type: ignore[arg-type]
        adapter.initialize(slot.base, layer_generator(seed, path))  # type: ignore[arg-type]
        slot.adapters[name] = adapter.train(slot.training)
    for path in targets.whole:
        slot = _slot(model, path, ModulesToSave)
        slot.adapters[name] = TrainableCopy(slot.base, config).train(slot.training)
    set_adapter(model, name)
    return report_injection(model, targets, name)


def set_adapter(model: nn.Module, name: str) -> None:
    """Make `name` the active adapter: only its weights may train, and layers that it does not reach have none."""
    if name not in adapter_names(model):
        known = ", ".join(adapter_names(model)) or "none"
        raise UserError(f"the model has no adapter {name!r}; it has: {known}", where="adapter")
    for _, slot in adapter_slots(model):
        slot.active = name if name in slot.adapters else None
        for other, part in slot.adapters.items():
            part.requires_grad_(other == name and bool(part.trainable))


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes as its base does."""
    before = [(slot, slot.enabled) for _, slot in adapter_slots(model)]
    try:
        for slot, _ in before:
            slot.enabled = False
        yield
    finally:
        for slot, enabled in before:
            slot.enabled = enabled


def remove_adapters(model: nn.Module) -> None:
    """Put every adapted layer back where its adapters stand: the model is again what it was before the first one."""
    for path, slot in list(adapter_slots(model)):
        model.set_submodule(path, slot.base)


def adapter_slots(model: nn.Module) -> Iterator[tuple[str, AdapterSlot]]:
    """The layers that have adapters, by the path that their base had."""
    for path, module in module_paths(model):
        if isinstance(module, AdapterSlot):
            yield path, module


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """The adapters of the model, in the order they came."""
    return tuple(dict.fromkeys(name for _, slot in adapter_slots(model) for name in slot.adapters))


def adapter_config(model: nn.Module, name: str = "default") -> LoraConfig:
    """The settings that the adapter was made with."""
    for _, slot in adapter_slots(model):
        if name in slot.adapters:
            config: LoraConfig = slot.adapters[name].config  # type: ignore[assignment]
            return config
    raise UserError(f"the model has no adapter {name!r}", where="adapter")


def adapter_parameters(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """The adapter's parameters by the names that `model.named_parameters()` gives them."""
    return {key: parameter for key, parameter in model.named_parameters() if f".adapters.{name}." in key}


def _check_name(model: nn.Module, name: str) -> None:
    # It becomes part of parameter names, so it holds no dot, and it must not hide a method of ModuleDict.
    if not re.fullmatch(r"\w[\w-]*", name) or hasattr(nn.ModuleDict, name):
        raise UserError(f"{name!r} cannot name an adapter", where="adapter", fix="Use letters, digits, - and _.")
    if name in adapter_names(model):
        raise UserError(f"the model already has an adapter {name!r}", where="adapter", fix="Choose another name.")


def _check_slots(model: nn.Module, targets: Targets) -> None:
    clashes = [path for path in targets.linears if isinstance(model.get_submodule(path), ModulesToSave)]
    clashes += [path for path in targets.whole if isinstance(model.get_submodule(path), LoRALinear)]
    if clashes:
        what = f"another adapter treats these in another way (whole or low-rank): {', '.join(clashes[:5])}"
        raise UserError(what, where="adapter", fix="Load one of the two adapters only.")


def _slot(model: nn.Module, path: str, kind: type[AdapterSlot]) -> AdapterSlot:
    module = model.get_submodule(path)
    if isinstance(module, AdapterSlot):
        return module
    slot = kind(module).train(module.training)
    model.set_submodule(path, slot)
    return slot
