"""PEFT's adapter_config.json and tensor names, in terms of ours. Checked against PEFT 0.21 in the tests."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nybble.adapters.config import LoraConfig
from nybble.errors import UserError, listed
from nybble.settings import parse_section

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

LORA_A, LORA_B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
BASE_COPY = ".base_layer."  # in the name of a weight that is the base's own

# Settings of PEFT that mean the same here, and what PEFT takes where a file leaves them out: not our own defaults.
_SHARED: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}

# Settings that change what an adapter computes, and the values under which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "lora_bias": (False, None),
    "layer_replication": (None, [], {}),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "ensure_weight_tying": (False, None),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "megatron_config": (None,),
    # These initializations leave the base as it is. PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ change it.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
}

# Settings that say how an adapter was made or where it came from, not what it computes.
_WITHOUT_EFFECT = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version"),
    *("inference_mode", "runtime_config", "fan_in_fan_out", "layers_to_transform", "layers_pattern"),
    *("target_modules", "exclude_modules", "modules_to_save", "megatron_core", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}


def peft_config(
    config: LoraConfig,
    *,
    base: str,
    revision: str | None,
    target_modules: str | tuple[str, ...],
    modules_to_save: tuple[str, ...],
    fan_in_fan_out: bool,
) -> dict[str, Any]:
    """The contents of adapter_config.json.

    Only settings that PEFT has known since 0.9 are written, since older releases refuse those they do not know; what is
    left out has its default.
    """
    alpha = config.lora_alpha
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "target_modules": target_modules if isinstance(target_modules, str) else sorted(target_modules),
        "modules_to_save": sorted(modules_to_save) or None,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "megatron_config": None,
        "megatron_core": "megatron.core",
    }
    if config.exclude_modules:  # known since 0.14
        exclude = config.exclude_modules
        values["exclude_modules"] = exclude if isinstance(exclude, str) else sorted(exclude)
    return dict(sorted(values.items()))


def parse_config(values: Mapping[str, Any], *, where: Path) -> LoraConfig:
    """LoraConfig from adapter_config.json; raises UserError that names every option nybble cannot honour."""
    if values.get("peft_type") != "LORA":
        kind = values.get("peft_type")
        raise UserError(f"is a PEFT adapter of type {kind}; nybble reads LORA", where=where)
    problems = [
        f"{name} = {value!r} is not supported" for name, value in values.items() if not _is_neutral(name, value)
    ]
    if problems:
        what = listed("options of this adapter change what it computes, and nybble does not:", problems)
        raise UserError(what, where=where, fix="Use this adapter with PEFT.")
    values = with_defaults(values)
    shared = {name: values[name] for name in _SHARED}
    names = {
        "target_modules": _names(values.get("target_modules")),
        "exclude_modules": _names(values.get("exclude_modules")),
        "modules_to_save": tuple(values.get("modules_to_save") or ()),
    }
    return parse_section(LoraConfig, shared | names, where=where)


def with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """What adapter_config.json says, with PEFT's defaults for what it leaves out of how an adapter computes."""
    return dict(values) | {name: default for name, default in _SHARED.items() if values.get(name) is None}


def split_name(name: str) -> tuple[str, str] | None:
    """`base_model.model.a.q_proj.lora_A.weight` -> (`a.q_proj`, `lora_A.weight`); None if it is no low-rank part.

    Older PEFT releases wrote the adapter's name or `.weight` into some: both are read.
    """
    match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.(lora_(A|B|magnitude_vector))(\.default)?(\.weight)?", name)
    if match is None:
        return None
    return match[1], match[2] if match[2] == MAGNITUDE else f"{match[2]}.weight"


def whole_name(name: str) -> str:
    """`base_model.model.lm_head.weight` -> `lm_head.weight`, the name in the model of a weight saved whole."""
    return re.sub(r"\.modules_to_save(\.default)?\.", ".", name.removeprefix(PREFIX))


def adapter_dtype(tensors: Mapping[str, torch.Tensor]) -> str:
    """How the adapter is held once loaded: bf16 if it was saved so, else fp32 (never fp16)."""
    low_rank = [tensor.dtype for name, tensor in tensors.items() if split_name(name)]
    return "bf16" if low_rank and all(dtype == torch.bfloat16 for dtype in low_rank) else "fp32"


def _is_neutral(name: str, value: Any) -> bool:
    if name in _SHARED or name in _WITHOUT_EFFECT:
        return True
    # An option of a later release is refused unless it is off.
    return value in _NEUTRAL[name] if name in _NEUTRAL else not value


def _names(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value or ())
