"""What the names in an adapter's settings mean, told by a module's path alone.

Matching is PEFT's: names match a path's end from a dot on, a string is a regular expression for the whole path.
"""

from __future__ import annotations

import re

from nybble.adapters.config import LoraConfig

Names = str | tuple[str, ...]

PRESETS = ("all-linear", "attention")


def matches(names: Names, path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def leaf(path: str) -> str:
    return path.rpartition(".")[2]


def is_named(config: LoraConfig, path: str, *, is_head: bool = False) -> bool:
    """Whether target_modules means the linear layer at `path`. is_head: of the model's output."""
    if config.target_modules == "all-linear":
        return not is_head
    return in_attention(path) if config.target_modules == "attention" else matches(config.target_modules, path)


def left_out(config: LoraConfig, path: str) -> bool:
    """Whether the layer is excluded, or trained whole."""
    return matches(config.exclude_modules, path) or is_trained_whole(config, path)


def is_trained_whole(config: LoraConfig, path: str) -> bool:
    return any(matches(config.modules_to_save, prefix) for prefix in _prefixes(path))


def in_attention(path: str) -> bool:
    # Every decoder in Transformers calls the owner of q, k, v, o something with "attn" or "attention", whether the
    # projections are named q_proj, qkv_proj, c_attn, query_key_value, Wqkv, c_proj, dense or out_proj.
    owner = leaf(path.rpartition(".")[0]).lower()
    return "attn" in owner or "attention" in owner


def _prefixes(path: str) -> list[str]:
    """`a.b.c` -> [`a`, `a.b`, `a.b.c`]."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
