"""A model to ask rather than to train: a checkpoint, with an adapter on it if there is one."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from nybble.adapters.io import attach_adapter
from nybble.adapters.provenance import base_fingerprint
from nybble.adapters.saved import SavedAdapter, check_base, read_adapter
from nybble.models.checkpoint import Checkpoint
from nybble.models.config import ModelConfig
from nybble.models.dtypes import resolve_device
from nybble.models.load import LoadedModel, load_model


def load_for_inference(config: ModelConfig, adapter: Path | None = None, *, progress: bool = False) -> LoadedModel:
    """Load the model on this process's device, with `adapter` (its folder, or a run's) active.

    The weights are held as they were when the adapter was trained, unless `config.storage` says otherwise; the
    tokenizer and chat template are those saved with the adapter. Raises UserError, before weights are read, for an
    adapter of another base.
    """
    device, trusted = resolve_device(), config.trust_remote_code
    if adapter is None:
        return load_model(config, device=device, progress=progress)
    saved = read_adapter(adapter)
    checkpoint = Checkpoint.open(config.name, config.revision, trust_remote_code=trusted)
    check_base(saved, base_fingerprint(checkpoint.folder, checkpoint.fingerprint))
    tokenizer = None
    if (saved.folder / "tokenizer_config.json").exists():  # PEFT alone does not save one
        tokenizer = AutoTokenizer.from_pretrained(saved.folder, trust_remote_code=trusted)
    loaded = load_model(
        _as_trained(config, saved), device=device, checkpoint=checkpoint, tokenizer=tokenizer, progress=progress
    )
    attach_adapter(loaded.model, saved)
    return loaded


def _as_trained(config: ModelConfig, saved: SavedAdapter) -> ModelConfig:
    origin = saved.provenance
    if origin is None or config.storage != "auto":
        return config
    trained = {"storage": origin.storage, "block_size": origin.block_size, "double_quant": origin.double_quant}
    return config.model_copy(update={key: value for key, value in trained.items() if value is not None})
