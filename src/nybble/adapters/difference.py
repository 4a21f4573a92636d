"""What training changed, as an adapter for weights that nothing was taken out of: scaling * (B A - B0 A0).

Its pairs are [B, -B0] and [A; A0], so its rank is twice that of the adapter. Any server loads it on the base itself,
while the adapter holds what its start put in as well.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nybble.adapters.peft_format import CONFIG_FILE, LORA_A, TENSORS_FILE, parse_config, split_name, with_defaults
from nybble.adapters.provenance import FILE as PROVENANCE_FILE
from nybble.adapters.provenance import Provenance
from nybble.adapters.saved import SavedAdapter
from nybble.adapters.start import FILE as START_FILE
from nybble.adapters.start import AdapterStart
from nybble.errors import UserError
from nybble.files import atomic_folder, read_json, write_json


def difference(saved: SavedAdapter) -> SavedAdapter:
    """The adapter less its start, for the base itself; itself if it began at zero or is a difference already.

    Raises UserError for an adapter that does not say where it began.
    """
    trained_on = saved.provenance
    if trained_on is None:
        what = "does not say where it began, so what training changed cannot be told"
        raise UserError(what, where=saved.folder)
    if not trained_on.counts_its_start:
        return saved
    assert saved.start is not None  # see read_adapter
    tensors = {name: _less_start(name, tensor, saved.start) for name, tensor in saved.tensors.items()}
    config = parse_config(_doubled(_settings(saved)), where=saved.folder / CONFIG_FILE)
    config = config.model_copy(update={"dtype": saved.config.dtype, "target_modules": saved.config.target_modules})
    changed = trained_on.model_copy(update={**_original(trained_on), "difference": True})
    return replace(saved, config=config, tensors=tensors, provenance=changed, start=None)


def save_difference(saved: SavedAdapter, folder: Path, *, replace: bool = False) -> None:
    """Write `difference(saved)` into `folder`, with all else that lies beside the adapter; may replace that itself.

    Raises UserError if the adapter began at zero, or is a difference already: there is nothing to take away; and where
    `require_kept_base` does.
    """
    less = difference(saved)
    if less is saved:
        fix = "Use it as it is: on the weights of its base it is the difference."
        raise UserError("began at zero, or is a difference already", where=saved.folder, fix=fix)
    assert saved.provenance is not None
    assert less.provenance is not None
    require_kept_base(Path(saved.provenance.base).expanduser())
    with atomic_folder(folder, replace=replace) as aside:
        for beside in saved.folder.iterdir():
            if beside.is_file() and beside.name not in (CONFIG_FILE, TENSORS_FILE, PROVENANCE_FILE, START_FILE):
                shutil.copyfile(beside, aside / beside.name)
        base = {"base_model_name_or_path": less.provenance.base, "revision": less.provenance.revision}
        write_json(aside / CONFIG_FILE, _doubled(_settings(saved)) | base)
        save_file(dict(less.tensors), aside / TENSORS_FILE, metadata={"format": "pt"})
        less.provenance.write(aside)


def require_kept_base(folder: Path) -> None:
    """Raise UserError if the weights that `folder` was quantized from are gone: a difference belongs on them alone."""
    recorded = Provenance.read(folder)
    if recorded is not None and not recorded.base_kept:
        what = f"was quantized from {recorded.base}, and no folder holds those weights: a difference belongs on them"
        fix = "Keep the adapter itself. For a difference merge in 16 bit, quantize that folder, and train on it."
        raise UserError(what, where=folder, fix=fix)


def _settings(saved: SavedAdapter) -> dict[str, Any]:
    return with_defaults(read_json(saved.folder / CONFIG_FILE))


def _original(trained_on: Provenance) -> dict[str, str | None]:
    """Name and revision of the checkpoint that a quantized folder was made of; any other base is that itself."""
    original = Provenance.read(Path(trained_on.base).expanduser()) or trained_on
    return {"base": original.base, "revision": original.revision}


def _doubled(values: dict[str, Any]) -> dict[str, Any]:
    """adapter_config.json of twice the rank and the same scaling."""
    factor = math.sqrt(2) if values["use_rslora"] else 2
    alpha = values["lora_alpha"] * factor
    return values | {
        "r": 2 * values["r"],
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "rank_pattern": {name: 2 * r for name, r in values["rank_pattern"].items()},
        "alpha_pattern": {name: factor * alpha for name, alpha in values["alpha_pattern"].items()},
    }


def _less_start(name: str, tensor: Tensor, start: AdapterStart) -> Tensor:
    """A's rows with those of its start below, B's columns with those of its start, turned round, to the right."""
    split = split_name(name)
    if split is None:
        return tensor
    initial = start.initial[split[0]]
    if split[1] == LORA_A:
        return torch.cat([tensor, initial.A.to(tensor.dtype)])
    return torch.cat([tensor, -initial.B.to(tensor.dtype)], dim=1)
