"""A model to ask rather than to train: a checkpoint, with an adapter on it if there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nybble.adapters.io import attach_adapter
from nybble.adapters.provenance import base_fingerprint, check_codes
from nybble.adapters.residual import KnownResidual
from nybble.adapters.saved import SavedAdapter, check_base, read_adapter
from nybble.config import RunConfig
from nybble.memory.budget import expand_segments
from nybble.models.checkpoint import Checkpoint
from nybble.models.config import ModelConfig
from nybble.models.dtypes import DTYPES, resolve_compute, resolve_device
from nybble.models.ends import place_ends
from nybble.models.load import LoadedModel, load_model, load_tokenizer, storage_of
from nybble.plan import MemoryPlan
from nybble.planner.evaluation import Held, Sequences
from nybble.planner.run_shape import RunShape
from nybble.quant.format import NF4Spec
from nybble.train.card import card_within
from nybble.train.fuse import hold_stock
from nybble.train.plan_evaluation import plan_evaluation


def load_for_inference(config: ModelConfig, adapter: Path | None = None, *, progress: bool = False) -> LoadedModel:
    """Load the model on this process's device, with `adapter` (its folder, or a run's) active.

    The weights are held as they were when the adapter was trained, unless `config.storage` says otherwise; the
    tokenizer and chat template are those saved with the adapter. Raises UserError, before weights are read, for an
    adapter of another base.
    """
    return _Opened.of(config, adapter).load(None, progress=progress)


def load_within_plan(
    config: RunConfig, adapter: Path | None = None, *, work: Sequence[Sequences] = (), progress: bool = False
) -> tuple[LoadedModel, Held]:
    """As `load_for_inference`, where `config.memory` says, and how: by itself as is fastest while `work` goes through.

    Activations and moments are of training, and what `config.memory` says of them is not looked at. Raises UserError,
    before weights are read, where the model does not fit.
    """
    device, opened = resolve_device(), _Opened.of(config.model, adapter)
    if device.type == "cuda":
        expand_segments()
    card = card_within(config.memory.budget_bytes, device)
    held = plan_evaluation(
        config.model_copy(update={"model": opened.config}),
        opened.checkpoint.config,
        card,
        opened.run_shape(device),
        work,
        lora=opened.saved.config if opened.saved else None,
        in_files=opened.files_hold_weights,
        on_gpu=device.type == "cuda",
    )
    loaded = opened.load(held.plan, progress=progress)
    place_ends(loaded.model, held.plan, device)
    hold_stock(loaded.model, held.plan, device)
    return loaded, held


@dataclass(frozen=True)
class _Opened:
    """What is known of a model before its weights are read. config: with its weights as the adapter was trained."""

    config: ModelConfig
    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    saved: SavedAdapter | None

    @classmethod
    def of(cls, config: ModelConfig, adapter: Path | None) -> _Opened:
        saved = read_adapter(adapter) if adapter else None
        checkpoint, tokenizer = open_for_inference(config, saved)
        return cls(_as_trained(config, saved, checkpoint) if saved else config, checkpoint, tokenizer, saved)

    @property
    def change(self) -> KnownResidual | None:
        """Of the weights, as they are loaded."""
        start = self.saved.start if self.saved else None
        return KnownResidual(start) if start and start.removed else None

    @property
    def storage(self) -> str:
        return storage_of(self.checkpoint) if self.config.storage == "auto" else self.config.storage

    @property
    def files_hold_weights(self) -> bool:
        """Whether the layers can stay in the checkpoint's files."""
        in_nf4 = bool(self.checkpoint.nf4_weights)
        return self.change is None and (in_nf4 if self.storage == "nf4" else self.config.storage == "auto")

    def run_shape(self, device: torch.device) -> RunShape:
        """How the weights are held and computed with."""
        config = self.config
        return RunShape(
            method="qlora" if self.storage == "nf4" else "lora",
            nf4=NF4Spec.of(config.block_size, double_quant=config.double_quant),
            storage_bytes=DTYPES.get(self.storage, self.checkpoint.dtype).itemsize,
            nf4_head=config.head == "nf4",
            compute_bytes=resolve_compute(config.compute, device).itemsize,
            fused=False,
        )

    def load(self, plan: MemoryPlan | None, *, progress: bool) -> LoadedModel:
        device = resolve_device()
        loaded = load_model(
            self.config,
            device=device,
            checkpoint=self.checkpoint,
            tokenizer=self.tokenizer,
            plan=plan,
            change=self.change,
            progress=progress,
        )
        if self.saved:
            attach_adapter(loaded.model, self.saved, device=device)
        return loaded


def open_for_inference(
    config: ModelConfig, saved: SavedAdapter | None = None
) -> tuple[Checkpoint, PreTrainedTokenizerBase]:
    """What `load_for_inference` starts from, checked, without reading a weight."""
    trusted = config.trust_remote_code
    checkpoint = Checkpoint.open(config.name, config.revision, trust_remote_code=trusted)
    if saved:
        check_base(saved, base_fingerprint(checkpoint.folder, checkpoint.fingerprint))
        if (saved.folder / "tokenizer_config.json").exists():  # PEFT alone does not save one
            return checkpoint, AutoTokenizer.from_pretrained(saved.folder, trust_remote_code=trusted)
    return checkpoint, load_tokenizer(checkpoint, trust_remote_code=trusted)


def _as_trained(config: ModelConfig, saved: SavedAdapter, checkpoint: Checkpoint) -> ModelConfig:
    origin = saved.provenance
    if origin is None or origin.difference or (config.storage != "auto" and origin.init != "calibrated"):
        return config
    check_codes(origin, checkpoint.folder, held=checkpoint.codes_fingerprint)
    if config.storage != "auto":
        return config
    # What is made while loading: the linears of a folder that holds NF4 bring their codes.
    made = origin.head or origin
    trained = {
        "storage": origin.storage,
        "head": "nf4" if origin.head and config.head == "auto" else None,
        "block_size": made.block_size,
        "double_quant": made.double_quant,
        "rounding": "search" if made.rounding == "search" else "nearest",
    }
    return config.model_copy(update={key: value for key, value in trained.items() if value is not None})
