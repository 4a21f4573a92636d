"""A model to ask rather than to train: a checkpoint, with an adapter on it if there is one."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nybble.adapters.io import attach_adapter
from nybble.adapters.provenance import base_fingerprint, check_codes
from nybble.adapters.residual import KnownResidual
from nybble.adapters.saved import SavedAdapter, check_base, read_adapter
from nybble.models.checkpoint import Checkpoint
from nybble.models.config import ModelConfig
from nybble.models.dtypes import resolve_device
from nybble.models.load import LoadedModel, load_model, load_tokenizer


def load_for_inference(config: ModelConfig, adapter: Path | None = None, *, progress: bool = False) -> LoadedModel:
    """Load the model on this process's device, with `adapter` (its folder, or a run's) active.

    The weights are held as they were when the adapter was trained, unless `config.storage` says otherwise; the
    tokenizer and chat template are those saved with the adapter. Raises UserError, before weights are read, for an
    adapter of another base.
    """
    saved = read_adapter(adapter) if adapter else None
    checkpoint, tokenizer = open_for_inference(config, saved)
    if saved:
        config = _as_trained(config, saved, checkpoint)
    change = KnownResidual(saved.start) if saved and saved.start and saved.start.removed else None
    loaded = load_model(
        config,
        device=resolve_device(),
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        change=change,
        progress=progress,
    )
    if saved:
        attach_adapter(loaded.model, saved)
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
    check_codes(origin, checkpoint.folder, holds_nf4=bool(checkpoint.nf4_weights))
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
