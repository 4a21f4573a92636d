"""How far an adapter reaches into a model, in numbers that are printed before each run."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from nybble.adapters.names import leaf
from nybble.adapters.targets import Targets, is_linear, module_paths
from nybble.quant.linear import NF4Linear
from nybble.units import format_count


@dataclass(frozen=True)
class ParameterCounts:
    """Weights as the model has them: an NF4 weight counts in_features * out_features, not its packed bytes."""

    trainable: int
    total: int

    @property
    def share(self) -> float:
        return self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"{format_count(self.trainable)} of {format_count(self.total)} parameters train ({self.share:.2%})"


@dataclass(frozen=True)
class InjectionReport:
    """What an adapter reaches. `layers`: name of a linear layer -> (how many are adapted, how many there are)."""

    name: str
    linears: tuple[str, ...]
    whole: tuple[str, ...]
    layers: dict[str, tuple[int, int]]
    excluded: tuple[str, ...]
    untouched_blocks: tuple[str, ...]
    reached_weights: int
    linear_weights: int
    parameters: ParameterCounts

    @property
    def partial(self) -> tuple[str, ...]:
        """Names of which some layers are adapted and others are not."""
        return tuple(suffix for suffix, (reached, total) in self.layers.items() if 0 < reached < total)

    @property
    def weight_share(self) -> float:
        """Share of the weights in linear layers that an adapter changes."""
        return self.reached_weights / self.linear_weights if self.linear_weights else 0.0

    def lines(self) -> list[str]:
        """For printing: what is reached, what is not, what trains."""
        return [*self.reach_lines(), str(self.parameters)]

    def reach_lines(self) -> list[str]:
        """The same without how many parameters train."""
        total = sum(total for _, total in self.layers.values())
        reached = ", ".join(f"{suffix} {have}/{total}" for suffix, (have, total) in self.layers.items())
        lines = [
            f"adapter reaches {len(self.linears)} of {total} linear layers, {self.weight_share:.1%} of their weights",
            f"by name: {reached}",
        ]
        if self.whole:
            lines.append(f"trained whole: {', '.join(self.whole)}")
        if self.partial:
            lines.append(f"only some of: {', '.join(self.partial)}")
        if self.untouched_blocks:
            lines.append(f"blocks without any adapter: {', '.join(self.untouched_blocks)}")
        return lines


def report_injection(model: nn.Module, targets: Targets, name: str) -> InjectionReport:
    """Count what `targets` reach in `model`; its parameters as they are: with an adapter's, if that was added."""
    linears: dict[str, Any] = {path: module for path, module in module_paths(model) if is_linear(module)}
    weights: dict[str, int] = {path: module.in_features * module.out_features for path, module in linears.items()}
    reached = set(targets.linears)
    layers: dict[str, tuple[int, int]] = {}
    for path, label in _labels(list(linears)).items():
        have, total = layers.get(label, (0, 0))
        layers[label] = (have + (path in reached), total + 1)
    return InjectionReport(
        name=name,
        linears=targets.linears,
        whole=targets.whole,
        layers=layers,
        excluded=targets.excluded,
        untouched_blocks=_untouched_blocks(list(linears), [*targets.linears, *targets.whole]),
        reached_weights=sum(weights[path] for path in reached),
        linear_weights=sum(weights.values()),
        parameters=count_parameters(model),
    )


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Trainable and total weights; tied ones count once."""
    counted: set[int] = set()
    trainable = total = 0
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in counted:
                continue
            counted.add(id(parameter))
            size = _weights_held(module, key, parameter)
            total += size
            trainable += size * parameter.requires_grad
    return ParameterCounts(trainable, total)


def _weights_held(module: nn.Module, key: str, parameter: nn.Parameter) -> int:
    if isinstance(module, NF4Linear) and key != "bias":
        return module.in_features * module.out_features if key == "codes" else 0
    return math.prod(parameter.shape)


def _labels(paths: list[str]) -> dict[str, str]:
    """The name of each path that its like in other blocks share: `q_proj`, or `attn.c_proj` where it has two kinds."""
    kinds = {path: path.removeprefix(f"{_block(path)}.") for path in paths}
    ends = Counter(leaf(kind) for kind in set(kinds.values()))
    return {path: leaf(kind) if ends[leaf(kind)] == 1 else kind for path, kind in kinds.items()}


def _untouched_blocks(linears: list[str], reached: list[str]) -> tuple[str, ...]:
    """The decoder blocks, such as `model.layers.3`, that have linear layers and no adapter, where others have one.

    Empty where no block has: then only what lies outside them was named, such as the head.
    """
    blocks = dict.fromkeys(block for path in linears if (block := _block(path)))
    with_adapter = {block for path in reached if (block := _block(path))}
    return tuple(block for block in blocks if block not in with_adapter) if with_adapter else ()


def _block(path: str) -> str | None:
    match = re.match(r"(?:.*?\.)?\d+(?=\.)", path)
    return match[0] if match else None
