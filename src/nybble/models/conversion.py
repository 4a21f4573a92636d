"""What a checkpoint's tensors are called and shaped in the model, by the conversions that Transformers declares.

Everything here that Transformers does not document is used here alone and listed in tests/models/test_conversion.py:
`get_model_conversion_mapping`, `rename_source_key`, `revert_weight_conversion`, the two transform classes, the order
of keys, the attributes of models that name tied, ignorable and fp32 parameters, and a configuration's attention.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from nybble.errors import UserError, listed

_ROTARY = r"rotary_emb\.inv_freq$"  # older checkpoints carry this buffer; models compute it


@dataclass(frozen=True)
class Assignment:
    """Checkpoint keys, in the order that matters, and the parameters that they make."""

    keys: tuple[str, ...]
    parameters: tuple[str, ...]
    _converter: WeightConverter | None = None
    _patterns: tuple[str, ...] = ()

    @property
    def is_rename(self) -> bool:
        """One tensor becomes one parameter as it is."""
        return self._converter is None

    def apply(self, tensors: Sequence[torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The parameters by name, from the tensors of `keys`."""
        if self._converter is None:
            return {self.parameters[0]: tensors[0]}
        converter = deepcopy(self._converter)
        for key, pattern, tensor in zip(self.keys, self._patterns, tensors, strict=True):
            converter.add_tensor(self.parameters[0], key, pattern, tensor)
        made = converter.convert(self.parameters[0], model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True)
class ParameterMap:
    """How all tensors of a checkpoint become all parameters of a model.

    `ties` maps each parameter that is another one to that other one; `duplicates` those that should be, but of which
    the checkpoint holds both.
    """

    assignments: tuple[Assignment, ...]
    ties: Mapping[str, str]
    duplicates: Mapping[str, str]
    leftover: tuple[str, ...]
    unfilled: tuple[str, ...]

    @classmethod
    def build(cls, model: PreTrainedModel, keys: Iterable[str]) -> ParameterMap:
        """Match the checkpoint's `keys` with a model that still has its stock modules, on any device."""
        assignments, leftover = _assign(model, keys)
        made = {name for assignment in assignments for name in assignment.parameters}
        declared = model.all_tied_weights_keys
        ties = _ties(declared, made)
        unfilled = [name for name in model.state_dict() if name not in made and ties.get(name) not in made]
        return cls(
            tuple(assignments),
            ties,
            {target: source for target, source in declared.items() if target in made and source in made},
            tuple(_drop_ignorable(leftover, _ignorable_leftovers(model))),
            tuple(_drop_ignorable(unfilled, list(model._keys_to_ignore_on_load_missing or []))),
        )

    @property
    def parameter_of(self) -> dict[str, str]:
        """Parameter by checkpoint key, for the keys that are renamed only."""
        return {entry.keys[0]: entry.parameters[0] for entry in self.assignments if entry.is_rename}

    @property
    def key_of(self) -> dict[str, str]:
        """Checkpoint key by parameter, the inverse of `parameter_of`; a tied parameter has that of the one it is."""
        keys = {parameter: key for key, parameter in self.parameter_of.items()}
        return keys | {tied: keys[source] for tied, source in self.ties.items() if source in keys}

    def require_complete(self, where: object) -> None:
        """Raise UserError that names the tensors without a place and the parameters without a tensor."""
        problems = []
        if self.leftover:
            problems.append(f"tensors that the model has no place for: {_some(self.leftover)}")
        if self.unfilled:
            problems.append(f"parameters that no tensor fills: {_some(self.unfilled)}")
        if problems:
            what = listed("the weights do not fit the model that config.json describes:", problems)
            raise UserError(what, where=where, fix="Is it a causal language model, and of this Transformers version?")


def checkpoint_names(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's tensors by the names, and in the pieces, that Transformers writes to files."""
    return dict(revert_weight_conversion(model, tensors))


def kept_in_fp32(model: PreTrainedModel, name: str, dtype: torch.dtype) -> bool:
    """Whether the model asks for parameter `name` in fp32 where others are in `dtype`."""
    modules = set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        modules |= set(model._keep_in_fp32_modules or ())
    return any(re.search(rf"(^|\.){module}($|\.)", name) for module in modules)


def attention_implementation(config: PreTrainedConfig) -> str:
    """The attention that the model uses, by Transformers' name: it can be set in public, and not be asked for."""
    return str(config.get_text_config()._attn_implementation)


def _assign(model: PreTrainedModel, keys: Iterable[str]) -> tuple[list[Assignment], list[str]]:
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    names = model.state_dict()
    prefix = model.base_model_prefix
    merged: dict[str, list[tuple[str, str]]] = {}
    assignments, leftover = [], []
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, names)
        if name not in names and key in names:  # a key that needed no renaming
            name, pattern = rename_source_key(key, [], [], prefix, names)
        if name not in names:
            leftover.append(key)
        elif pattern is None:
            assignments.append(Assignment((key,), (name,)))
        else:
            merged.setdefault(name, []).append((key, pattern))
    for name, parts in merged.items():
        part_keys, patterns = zip(*parts, strict=True)
        converter = by_pattern[patterns[0]]
        assignments.append(Assignment(part_keys, _targets(converter, name), converter, patterns))
    return assignments, leftover


def _targets(converter: WeightConverter, first: str) -> tuple[str, ...]:
    head, *others = converter.target_patterns
    return (first, *(first.replace(head, other) for other in others))


def _ties(declared: Mapping[str, str], made: set[str]) -> dict[str, str]:
    ties = {}
    for target, source in declared.items():
        if target not in made:
            ties[target] = source
        elif source not in made:  # the file has the weight under the other name
            ties[source] = target
    return ties


def _ignorable_leftovers(model: PreTrainedModel) -> list[str]:
    # Buffers that are computed, not loaded: GPT-2's causal masks in old files.
    saved = model.state_dict()
    prefix = f"{model.base_model_prefix}."
    buffers = [name for name, _ in model.named_buffers() if name not in saved]
    computed = [rf"^({re.escape(prefix)})?{re.escape(name.removeprefix(prefix))}$" for name in buffers]
    return [_ROTARY, *computed, *(model._keys_to_ignore_on_load_unexpected or [])]


def _drop_ignorable(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + rest
