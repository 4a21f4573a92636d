"""Layers that a calibration has finished, a file each, so that an interrupted one goes on.

It goes on behind the last layer that was quantized; in later stages all layers are trained together, and it goes on at
the stage. `tokens.safetensors` holds how much tokens weigh, `untuned.json` that corrections were begun on scales that
were not tuned. `quantized-00003.safetensors` holds of each linear `P`: `P.weight` and its parts as bitsandbytes has
them, and where a correction was made `P.correction.U` (out, R) and `P.correction.V` (R, in). Its metadata name the
linears that no token of the text reached.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from nybble.files import read_json, write_bytes, write_json
from nybble.quant.bnb import from_bnb, part_keys, quantized_names, to_bnb
from nybble.quant.correction import Correction
from nybble.quant.weight import NF4Weight

_SETTINGS = "settings.json"
_U, _V = ".correction.U", ".correction.V"
_TOKEN_WEIGHTS = "tokens.safetensors"
_UNTUNED = "untuned.json"
_UNREACHED = "unreached"  # metadata: paths, as JSON


@dataclass(frozen=True)
class PreparedLinear:
    """A linear's weight in NF4, its low-rank correction if one was made, and whether the text reached it."""

    weight: NF4Weight
    correction: Correction | None
    reached: bool


@dataclass(frozen=True)
class FinishedLayers:
    """The layers of one stage in the folder of a calibration. Each file is whole or not there."""

    folder: Path
    stage: str = "quantized"
    untuned_bytes: int = 0  # of the device, which tuning would have needed

    @classmethod
    def open(cls, folder: Path, settings: Mapping[str, Any]) -> FinishedLayers:
        """The first stage in `folder`, if that was made under the same `settings`; else the folder is emptied."""
        known = folder / _SETTINGS
        if not known.exists() or read_json(known) != settings:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_json(known, dict(settings))
        untuned = folder / _UNTUNED
        return cls(folder, untuned_bytes=read_json(untuned) if untuned.exists() else 0)

    def settle(self) -> None:
        """Whether scales are tuned is decided from here on, however much memory there is when this goes on."""
        if self.untuned_bytes:
            write_json(self.folder / _UNTUNED, self.untuned_bytes)

    def next(self, stage: str) -> FinishedLayers:
        """Another stage of the same calibration."""
        return replace(self, stage=stage)

    def has(self, index: int) -> bool:
        return self._file(index).exists()

    def all(self, number: int) -> bool:
        """Whether that many layers are there."""
        return all(map(self.has, range(number)))

    def write(self, index: int, linears: Mapping[str, PreparedLinear], dtype: torch.dtype) -> None:
        """Keep layer `index`: its linears by path. dtype: of the checkpoint."""
        tensors: dict[str, Tensor] = {}
        for path, linear in linears.items():
            tensors |= to_bnb(f"{path}.weight", linear.weight, dtype)
            if linear.correction is not None:
                tensors[path + _U], tensors[path + _V] = linear.correction.U, linear.correction.V
        unreached = json.dumps([path for path, linear in linears.items() if not linear.reached])
        held = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_bytes(self._file(index), save(held, metadata={_UNREACHED: unreached}))

    def write_token_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Keep how much tokens weigh, by the first path of the linears that get them."""
        write_bytes(self.folder / _TOKEN_WEIGHTS, save({path: found.cpu() for path, found in weights.items()}))

    def token_weights(self, device: torch.device) -> dict[str, Tensor] | None:
        """What was kept of these; None before."""
        file = self.folder / _TOKEN_WEIGHTS
        return load_file(file, device=str(device)) if file.exists() else None

    def linears(self, index: int, device: torch.device) -> dict[str, PreparedLinear]:
        """What was kept of a finished layer, on `device`."""
        with safe_open(self._file(index), framework="pt") as tensors:
            keys = list(tensors.keys())
            unreached = json.loads(tensors.metadata()[_UNREACHED])
            paths = [name.removesuffix(".weight") for name in sorted(quantized_names(keys))]
            found = {}
            for path in paths:
                weight, correction = _weight(f"{path}.weight", tensors, keys), _correction(path, tensors)
                on_device = None if correction is None else correction.to(device)
                found[path] = PreparedLinear(weight.to(device), on_device, path not in unreached)
            return found

    def weight(self, path: str) -> NF4Weight | None:
        """The weight of one linear, when the pass is over; None if it is in no layer of the model's."""
        if path not in self._files:
            return None
        with safe_open(self._files[path], framework="pt") as tensors:
            return _weight(f"{path}.weight", tensors, list(tensors.keys()))

    def corrections(self) -> Iterator[tuple[str, Correction]]:
        """The corrections of all linears by path, when the pass is over."""
        for path, file in self._files.items():
            with safe_open(file, framework="pt") as tensors:
                correction = _correction(path, tensors)
            if correction is not None:
                yield path, correction

    def unreached(self) -> tuple[str, ...]:
        """The paths of the linears that no token of the text reached, when the pass is over."""
        found: list[str] = []
        for file in self._layers:
            with safe_open(file, framework="pt") as tensors:
                found += json.loads(tensors.metadata()[_UNREACHED])
        return tuple(found)

    def remove(self) -> None:
        """What was kept of all stages is no longer needed."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @cached_property
    def _files(self) -> dict[str, Path]:
        """Where each linear lies, by path."""
        files: dict[str, Path] = {}
        for file in self._layers:
            with safe_open(file, framework="pt") as tensors:
                files |= {name.removesuffix(".weight"): file for name in sorted(quantized_names(tensors.keys()))}
        return files

    @property
    def _layers(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.stage}-*.safetensors"))

    def _file(self, index: int) -> Path:
        return self.folder / f"{self.stage}-{index:05d}.safetensors"


def _weight(name: str, tensors: Any, keys: list[str]) -> NF4Weight:
    return from_bnb(name, {key: tensors.get_tensor(key) for key in part_keys(name, keys)})


def _correction(path: str, tensors: Any) -> Correction | None:
    if path + _U not in tensors.keys():  # noqa: SIM118  # it is no mapping
        return None
    return Correction(tensors.get_tensor(path + _U), tensors.get_tensor(path + _V))
