"""What a run trains, an adapter or the whole model: how it goes into a checkpoint and how it is saved at the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nybble.adapters.difference import save_difference
from nybble.adapters.io import save_adapter, set_adapter_tensors
from nybble.adapters.provenance import Provenance
from nybble.adapters.saved import read_adapter
from nybble.adapters.start import AdapterStart
from nybble.errors import UserError
from nybble.models.save import save_full_model
from nybble.sharded import sharded_like
from nybble.train.processes import rank, wait_for_all
from nybble.train.tensors import read_tensors, write_tensors


@dataclass(frozen=True)
class AdapterWeights:
    """The adapter `default` of `model`, and where it began; in a checkpoint too it is a folder that PEFT can load."""

    model: PreTrainedModel
    provenance: Provenance
    start: AdapterStart | None = None  # None: at zero
    as_difference: bool = False  # the result; checkpoints hold the adapter itself
    folder_name: str = "adapter"

    def save(self, folder: Path) -> None:
        save_adapter(
            self.model, folder / self.folder_name, provenance=self.provenance, start=self.start, write=rank() == 0
        )

    def load(self, folder: Path) -> None:
        set_adapter_tensors(self.model, read_adapter(folder / self.folder_name).tensors)

    def export(self, output: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
        """Write the result of the run, tokenizer and chat template beside it, and read it back; returns its folder."""
        folder = output / self.folder_name
        save_adapter(
            self.model,
            folder,
            provenance=self.provenance,
            start=self.start,
            tokenizer=tokenizer,
            replace=True,
            write=rank() == 0,
        )
        if self.as_difference and rank() == 0:
            save_difference(read_adapter(folder), folder, replace=True)
        wait_for_all()
        return folder


@dataclass(frozen=True)
class FullWeights:
    """Every parameter of `model`; a checkpoint holds them as they are while training, whatever dtype the result has."""

    model: PreTrainedModel
    dtype: torch.dtype
    folder_name: str = "model"

    def save(self, folder: Path) -> None:
        write_tensors(folder, "parameters", self.model.named_parameters())

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        own = dict(self.model.named_parameters())
        for name, value in read_tensors(folder, "parameters"):
            own.pop(name).copy_(sharded_like(value, self.model.get_parameter(name)))
        if own:
            raise UserError(f"lacks {len(own)} parameters of the model: {', '.join(list(own)[:5])}", where=folder)

    def export(self, output: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
        """Write the model as a folder that Transformers loads, and read it back; returns it."""
        folder = output / self.folder_name
        save_full_model(self.model, folder, tokenizer, self.dtype, replace=True, write=rank() == 0)
        wait_for_all()
        return folder
