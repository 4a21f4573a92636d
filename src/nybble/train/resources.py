"""What a run takes from outside: its rows and its model, read for it alone. Who runs several may hand out kept ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from nybble.config import RunConfig
from nybble.data.prepare import PreparedData, prepare_data
from nybble.models.checkpoint import Checkpoint
from nybble.models.dtypes import resolve_storage
from nybble.models.load import LoadedModel, load_model
from nybble.plan import MemoryPlan
from nybble.train.start import change_of_base

if TYPE_CHECKING:
    from nybble.train.cadence import Run


class Resources:
    """Where `run_training` gets what it needs; it asks in the order of these methods."""

    def prepare(
        self, config: RunConfig, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, *, progress: bool
    ) -> PreparedData:
        """The rows to train on, and those that choose the best checkpoint."""
        return prepare_data(config.data, tokenizer, model_max_length=checkpoint.max_positions, progress=progress)

    def load(
        self,
        config: RunConfig,
        checkpoint: Checkpoint,
        tokenizer: PreTrainedTokenizerBase,
        *,
        plan: MemoryPlan,
        device: torch.device,
        progress: bool,
    ) -> LoadedModel:
        """The model without adapters, frozen, less what its adapter begins with, where `plan` has them."""
        return load_model(
            config.model,
            device=device,
            storage=resolve_storage(config.model.storage, config.method),
            checkpoint=checkpoint,
            tokenizer=tokenizer,
            plan=plan,
            change=change_of_base(config),
            progress=progress,
        )

    def ready(self, run: Run) -> None:
        """The run stands before its next step, its weights as that step will find them."""
