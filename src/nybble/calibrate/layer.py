"""A decoder layer, its linears by path, and the order in which it calls them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from nybble.calibrate.calls import LayerCall
from nybble.calibrate.correction import CARRIED_RANK
from nybble.calibrate.finished import PreparedLinear
from nybble.calibrate.moments import InputMoments
from nybble.calibrate.tuned import TunedScales
from nybble.quant.linear import DenseLinear, NF4Linear


@dataclass(frozen=True)
class Layer:
    """The layer at path `at` of a model, or a copy on the device that computes, and how the model calls it."""

    at: str
    module: nn.Module
    call: LayerCall

    def copy(self) -> Layer:
        return replace(self, module=copy.deepcopy(self.module))

    def dense(self, paths: Iterable[str] | None = None) -> dict[str, DenseLinear]:
        """The linears at `paths` in the model, or all; those that are dense."""
        inside = {f"{self.at}.{name}": module for name, module in self.module.named_modules()}
        wanted = inside if paths is None else {path: inside[path] for path in paths}
        return {path: module for path, module in wanted.items() if isinstance(module, DenseLinear)}

    def quantize_(self, prepared: Mapping[str, PreparedLinear]) -> None:
        """Compute with these weights, by path."""
        for path, dense in self.dense(prepared).items():
            self._set(path, _quantized(dense, prepared[path]))

    def correct_(self, prepared: Mapping[str, PreparedLinear]) -> None:
        """The same, with what of their corrections is carried along."""
        for path, dense in self.dense(prepared).items():
            self._set(path, _corrected(dense, prepared[path]))

    def tune_(self, prepared: Mapping[str, PreparedLinear]) -> None:
        """Compute with these weights, by path; the scales of those that the text reached can be trained."""
        reached = {path: linear for path, linear in prepared.items() if linear.reached}
        for path, dense in self.dense(reached).items():
            tuned = TunedScales(reached[path].weight, dense.bias, dense.compute_dtype)
            self._set(path, tuned.to(dense.weight.device))
        self.quantize_(prepared)  # the rest, which is dense as yet

    def tuned(self) -> dict[str, TunedScales]:
        """The linears whose scales can be trained, by path in the model."""
        inside = {f"{self.at}.{name}": module for name, module in self.module.named_modules()}
        return {path: module for path, module in inside.items() if isinstance(module, TunedScales)}

    def _set(self, path: str, linear: nn.Module) -> None:
        self.module.set_submodule(path.removeprefix(f"{self.at}."), linear)


def find_stages(linears: Mapping[str, DenseLinear], run: Callable[[], object]) -> list[list[str]]:
    """The paths of `linears` in the order in which `run` calls them; those that read the same tensor are one stage.

    Linears that differ by a number alone, as those of experts, are of one stage. What is never called comes last.
    """
    moments = InputMoments()
    with moments.watching(linears):
        run()
    stage_of: dict[str, int] = {}
    for paths, _ in moments.groups():
        kinds = [_kind(path) for path in paths]
        known = [stage_of[kind] for kind in kinds if kind in stage_of]
        stage = known[0] if known else len(set(stage_of.values()))
        for kind in kinds:
            stage_of.setdefault(kind, stage)
    stages: dict[int, list[str]] = {}
    for path in linears:
        stages.setdefault(stage_of.get(_kind(path), len(linears)), []).append(path)
    return [stages[number] for number in sorted(stages)]


def _kind(path: str) -> str:
    return re.sub(r"\.\d+\b", "", path)


def _quantized(dense: DenseLinear, prepared: PreparedLinear) -> NF4Linear:
    return NF4Linear(prepared.weight, dense.bias, dense.compute_dtype).to(dense.weight.device)


def _corrected(dense: DenseLinear, prepared: PreparedLinear) -> nn.Module:
    quantized = _quantized(dense, prepared)
    if prepared.correction is None:
        return quantized
    carried = prepared.correction.rank(CARRIED_RANK)
    weight = quantized.dequantize(torch.float32)
    weight.addmm_(carried.U.to(weight.device), carried.V.to(weight.device))
    return DenseLinear.from_weight(weight.to(dense.compute_dtype), dense.bias, dense.compute_dtype)
