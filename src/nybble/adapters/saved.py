"""An adapter folder as it was read, apart from any model: settings, tensors, provenance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from nybble.adapters.config import LoraConfig
from nybble.adapters.peft_format import (
    BASE_COPY,
    CONFIG_FILE,
    LORA_A,
    LORA_B,
    MAGNITUDE,
    TENSORS_FILE,
    adapter_dtype,
    parse_config,
    split_name,
    whole_name,
)
from nybble.adapters.provenance import FILE as PROVENANCE_FILE
from nybble.adapters.provenance import Provenance
from nybble.adapters.start import FILE as START_FILE
from nybble.adapters.start import AdapterStart
from nybble.errors import UserError, listed
from nybble.files import explain_corruption, read_json


@dataclass(frozen=True)
class LowRankPair:
    """What the file has for one layer: A (r, in), B (out, r), magnitude (out,) if DoRA."""

    A: Tensor
    B: Tensor
    magnitude: Tensor | None
    scaling: float

    def rows(self, rows: slice) -> LowRankPair:
        """The pair of a weight that has only these rows of the layer's."""
        return replace(self, B=self.B[rows], magnitude=None if self.magnitude is None else self.magnitude[rows])


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter folder as it was read, apart from any model."""

    folder: Path
    config: LoraConfig
    base_model_name: str | None
    revision: str | None  # of the base, where that is a model on the hub
    tensors: Mapping[str, Tensor]
    provenance: Provenance | None
    start: AdapterStart | None = None  # where it began, if not at zero

    @cached_property
    def pairs(self) -> dict[str, LowRankPair]:
        """The low-rank pairs by the path of their layer."""
        return {
            path: LowRankPair(parts[LORA_A], parts[LORA_B], parts.get(MAGNITUDE), self.config.at(path).scaling)
            for path, parts in _low_rank_parts(self.tensors).items()
        }

    @cached_property
    def whole(self) -> dict[str, Tensor]:
        """The weights trained and saved whole, by their names in the model."""
        return {
            whole_name(name): tensor
            for name, tensor in self.tensors.items()
            if split_name(name) is None and BASE_COPY not in name
        }

    @cached_property
    def base_copies(self) -> dict[str, Tensor]:
        """Weights of the base itself, by their names in the model: PEFT saves them for an output head it adapts."""
        return {
            whole_name(name).replace(BASE_COPY, "."): tensor
            for name, tensor in self.tensors.items()
            if BASE_COPY in name
        }


def adapter_folder(path: str | Path) -> Path:
    """The adapter folder at `path`: itself, or `adapter` inside a run's folder. Raises UserError without one."""
    path = Path(path).expanduser()
    for folder in (path, path / "adapter"):
        if (folder / CONFIG_FILE).exists():
            return folder
    if not path.exists():
        raise UserError("no such folder", where=path)
    fix = "Give the folder of a run, or one that holds adapter_config.json."
    if (path / "config.json").exists():
        fix = "This is a whole model, not an adapter: give it as the model."
    elif (path / "model" / "config.json").exists():
        fix = f"This run trained a whole model: give {path / 'model'} as the model."
    elif saved := sorted(path.glob("checkpoints/*/adapter")):
        fix = f"This run is not finished: go on with --resume, or give its newest checkpoint, {saved[-1]}."
    raise UserError("holds no adapter", where=path, fix=fix)


def read_adapter(path: str | Path) -> SavedAdapter:
    """Read a run's or an adapter's folder; raises UserError for what is missing, corrupt, or not supported."""
    folder = adapter_folder(path)
    values = read_json(folder / CONFIG_FILE)
    if not isinstance(values, dict):
        raise UserError("does not hold settings", where=folder / CONFIG_FILE)
    config = parse_config(values, where=folder / CONFIG_FILE)
    tensors = _read_tensors(folder)
    update: dict[str, object] = {"dtype": adapter_dtype(tensors)}
    if values.get("layers_to_transform") is not None:
        # PEFT's way to say "only these decoder blocks"; the file's own tensors say which layers that were.
        update["target_modules"] = tuple(_low_rank_parts(tensors))
    config = config.model_copy(update=update)
    _check_tensors(folder / TENSORS_FILE, config, tensors)
    provenance, start = Provenance.read(folder), AdapterStart.read(folder, config)
    _check_start(folder, provenance, start)
    base = values.get("base_model_name_or_path")
    revision = _revision(base, values.get("revision"))
    return SavedAdapter(folder, config, base, revision, tensors, provenance, start)


def check_base(saved: SavedAdapter, fingerprint: str | None) -> None:
    """Raise UserError if the adapter records another base than the one with `fingerprint`."""
    recorded = saved.provenance
    if recorded is None or fingerprint is None or recorded.base_fingerprint == fingerprint:
        return
    fix = "Give the base that it was trained on."
    if not recorded.counts_its_start:
        fix += " To use it all the same, remove nybble.json from its folder."
    raise UserError(
        f"was trained on {recorded.base_in_words}, whose weights are not those of this model "
        f"(fingerprint {recorded.base_fingerprint[:12]}, here {fingerprint[:12]})",
        where=saved.folder,
        fix=fix,
    )


def _revision(base: Any, said: Any) -> Any:
    """The revision that belongs to `base`: none where that is a folder here, of which PEFT passes over it too."""
    return None if base and Path(str(base)).expanduser().is_dir() else said


def _check_start(folder: Path, provenance: Provenance | None, start: AdapterStart | None) -> None:
    """Raise UserError unless what the adapter says of its start is beside it, and the other way round."""
    if provenance is None and start is not None:
        what = f"{START_FILE} says where the adapter began, and no {PROVENANCE_FILE} says on which base"
        raise UserError(what, where=folder, fix=f"Copy {PROVENANCE_FILE} from the folder that training wrote.")
    if provenance is None or not provenance.counts_its_start:
        return
    if start is None:
        what = f"the adapter began at {provenance.init}, and no {START_FILE} says where that was"
        raise UserError(what, where=folder, fix=f"Copy {START_FILE} from the folder that training wrote.")
    if start.residual_fingerprint(provenance.base_fingerprint) != provenance.residual_fingerprint:
        what = f"{START_FILE} is not that of this adapter: what it takes out of the base is something else"
        raise UserError(what, where=folder, fix=f"Copy {START_FILE} from the folder that training wrote.")


def is_copy(weight: Tensor, copy: Tensor) -> bool:
    """Whether `copy` is `weight`, but for the rounding of one 16-bit dtype to another."""
    copy = copy.to(weight.device)
    return weight.shape == copy.shape and torch.allclose(weight.float(), copy.float(), rtol=2**-7)


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that hold NaN or infinity."""
    # By the extremes, which NaN becomes: `isfinite` would make two copies of an embedding that was trained whole.
    return [
        name
        for name, tensor in tensors.items()
        if tensor.numel() and not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))
    ]


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / TENSORS_FILE
    if not file.exists():
        if pickles := sorted(path.name for path in folder.glob("adapter_model.bin")):
            what = f"has its tensors in {pickles[0]}, a pickle, which can run code when read"
            raise UserError(what, where=folder, fix="Load it with PEFT where you trust it, and save it again.")
        raise UserError("no such file", where=file)
    with explain_corruption(file):
        tensors: dict[str, Tensor] = load_file(file)
    return tensors


def _check_tensors(file: Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    problems = [] if tensors else ["it holds no tensors at all"]
    problems += [f"{name} is of a kind that is not supported" for name in tensors if ".lora_embedding_" in name]
    problems += [f"{name} holds NaN or infinite values" for name in non_finite(tensors)]
    for path, parts in _low_rank_parts(tensors).items():
        expected = {LORA_A, LORA_B, *([MAGNITUDE] if config.use_dora else [])}
        if set(parts) != expected:
            problems.append(f"{path} has {', '.join(sorted(parts))}, and should have {', '.join(sorted(expected))}")
        elif parts[LORA_A].shape[0] != config.at(path).r or parts[LORA_B].shape[1] != config.at(path).r:
            problems.append(f"{path} has rank {parts[LORA_A].shape[0]}; {CONFIG_FILE} says {config.at(path).r}")
    if problems:
        raise UserError(listed("cannot be used:", problems, most=8), where=file)


def _low_rank_parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in sorted(tensors.items()):
        if (split := split_name(name)) is not None:
            found[split[0]][split[1]] = tensor
    return dict(found)
