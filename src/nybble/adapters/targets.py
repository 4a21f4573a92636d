"""Which modules an adapter reaches.

Matching is PEFT's: names match a path's end from a dot on, a string is a regular expression for the whole path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import nn

from nybble.adapters.config import LoraConfig, matching_pattern
from nybble.adapters.lora import AdapterSlot, LoRALinear, is_frozen_linear
from nybble.adapters.modules_to_save import ModulesToSave
from nybble.adapters.names import PRESETS, Names, in_attention, is_named, leaf, left_out, matches
from nybble.errors import UserError, listed


@dataclass(frozen=True)
class Targets:
    """Paths in model order: linear layers that get a low-rank pair, modules trained whole, linear layers left out."""

    linears: tuple[str, ...]
    whole: tuple[str, ...]
    excluded: tuple[str, ...] = ()


def find_targets(model: nn.Module, config: LoraConfig) -> Targets:
    """Resolve the names and patterns of `config` on `model`.

    Raises one UserError that lists everything unmatched; also if no linear gets a low-rank pair, as PEFT loads no
    adapter of whole modules alone.
    """
    paths = dict(module_paths(model))
    linears = [path for path, module in paths.items() if is_linear(module)]
    whole = tuple(path for path in paths if config.modules_to_save and matches(config.modules_to_save, path))
    wanted = _wanted(model, config, linears)
    reached = tuple(path for path in wanted if not left_out(config, path))
    problems = [
        *_unmatched_targets(config, paths),
        *_unmatched("exclude_modules", config.exclude_modules, linears),
        *_unmatched("modules_to_save", config.modules_to_save, list(paths)),
        *_unmatched_patterns("rank_pattern", config.rank_pattern, reached),
        *_unmatched_patterns("alpha_pattern", config.alpha_pattern, reached),
        *_not_single(config, paths),
    ]
    if not reached and (wanted or not problems):
        left = "target_modules less exclude_modules and modules_to_save leaves no linear layer for a low-rank pair"
        problems.append(f"{left}, and PEFT loads no adapter without one")
    if problems:
        names = ", ".join(sorted({leaf(path) for path in linears}))
        what = listed("the adapter does not fit this model:", problems)
        raise UserError(what, where="lora", fix=f"Linear layers of this model: {names}.")
    return Targets(reached, whole, tuple(path for path in wanted if path not in reached))


def module_paths(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules by path, as they were before any adapter: what wrappers hold is passed over."""
    hidden: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not path or (hidden and path.startswith(hidden)):
            continue
        yield path, module
        if isinstance(module, AdapterSlot):
            hidden += (f"{path}.",)


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter can be put beside `module`, or already is."""
    if isinstance(module, ModulesToSave):
        return is_linear(module.base)
    return isinstance(module, LoRALinear) or is_frozen_linear(module)


def wanted_linears(model: nn.Module, config: LoraConfig) -> list[str]:
    """The linear layers that target_modules names and nothing leaves out, whether or not every name matches."""
    linears = [path for path, module in module_paths(model) if is_linear(module)]
    return [path for path in _wanted(model, config, linears) if not left_out(config, path)]


def shortest_names(chosen: Iterable[str], paths: Iterable[str], *, boundary: str = ".") -> tuple[str, ...]:
    """For each path in `chosen` its shortest end that no other of `paths` has, sorted and without repetition.

    PEFT finds target_modules by ends from a dot on, and modules_to_save by any end (boundary=""): its `norm` is also
    `input_layernorm`.
    """
    inside = set(chosen)
    outside = [path for path in paths if path not in inside]

    def is_own(end: str) -> bool:
        return not any(path == end or path.endswith(boundary + end) for path in outside)

    return tuple(sorted({next(filter(is_own, _ends(path)), path) for path in inside}))


def _ends(path: str) -> list[str]:
    """`a.b.c` -> [`c`, `b.c`, `a.b.c`]."""
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def _wanted(model: nn.Module, config: LoraConfig, linears: list[str]) -> list[str]:
    head = _output_head(model)
    return [path for path in linears if is_named(config, path, is_head=model.get_submodule(path) is head)]


def _output_head(model: nn.Module) -> Any:
    find = getattr(model, "get_output_embeddings", None)
    return find() if find is not None else None


def _unmatched_targets(config: LoraConfig, paths: dict[str, nn.Module]) -> list[str]:
    linears = [path for path, module in paths.items() if is_linear(module)]
    if config.target_modules in PRESETS:
        found = linears if config.target_modules == "all-linear" else [path for path in linears if in_attention(path)]
        return [] if found else [f"target_modules: {config.target_modules!r} finds no linear layer"]
    problems = _unmatched("target_modules", config.target_modules, linears)
    if isinstance(config.target_modules, str):
        return problems
    others = [path for path in paths if path not in linears]
    for name in config.target_modules:
        if kinds := sorted({type(paths[path]).__name__ for path in others if matches((name,), path)}):
            problems = [problem for problem in problems if not problem.startswith(f"target_modules: {name!r} ")]
            problems.append(
                f"target_modules: {name!r} is a {kinds[0]}, not a linear layer; modules_to_save can train it whole"
            )
    return problems


def _unmatched(setting: str, names: Names, paths: list[str]) -> list[str]:
    if isinstance(names, str):
        if any(matches(names, path) for path in paths):
            return []
        hint = " (names are given as a list: [q_proj, v_proj])" if re.fullmatch(r"[\w.]+", names) else ""
        return [f"{setting}: the regular expression {names!r} matches no whole path{hint}"]
    return [
        f"{setting}: {name!r} matches nothing{_near(name, paths)}"
        for name in names
        if not any(matches((name,), path) for path in paths)
    ]


def _unmatched_patterns(setting: str, patterns: Iterable[str], reached: tuple[str, ...]) -> list[str]:
    return [
        f"{setting}: {pattern!r} matches no layer that is adapted{_near(pattern, reached)}"
        for pattern in patterns
        if not any(matching_pattern([pattern], path) for path in reached)
    ]


def _not_single(config: LoraConfig, paths: dict[str, nn.Module]) -> list[str]:
    problems = []
    for name in config.modules_to_save:
        found = [module for path, module in paths.items() if matches((name,), path)]
        made_of_others = [module for module in found if not isinstance(module, AdapterSlot) and any(module.children())]
        if made_of_others:
            kind = type(made_of_others[0]).__name__
            problems.append(f"modules_to_save: {name!r} is a {kind} made of others; name those")
    return problems


def _near(name: str, paths: Iterable[str]) -> str:
    ends = sorted({end for path in paths for end in _ends(path)[: name.count(".") + 1]})
    close = get_close_matches(name, ends, n=3, cutoff=0.5)
    close = close or [end for end in ends if name in end or end in name][:3]
    return f"; did you mean {', '.join(map(repr, close))}?" if close else ""
