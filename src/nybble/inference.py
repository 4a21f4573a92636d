"""A model to ask rather than to train: a checkpoint, with an adapter on it if there is one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import AutoTokenizer

from nybble.adapters.io import load_adapter
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
    saved = read_adapter(adapter) if adapter else None
    if saved:
        checkpoint = Checkpoint.open(config.name, config.revision, trust_remote_code=config.trust_remote_code)
        check_base(saved, base_fingerprint(checkpoint.folder, checkpoint.fingerprint))
        config = _as_trained(config, saved)
    loaded = load_model(config, device=resolve_device(), progress=progress)
    if saved is None:
        return loaded
    load_adapter(loaded.model, saved.folder)
    if not (saved.folder / "tokenizer_config.json").exists():  # PEFT alone does not save one
        return loaded
    return replace(loaded, tokenizer=AutoTokenizer.from_pretrained(saved.folder))


def _as_trained(config: ModelConfig, saved: SavedAdapter) -> ModelConfig:
    origin = saved.provenance
    if origin is None or config.storage != "auto":
        return config
    trained = {"storage": origin.storage, "block_size": origin.block_size, "double_quant": origin.double_quant}
    return config.model_copy(update={key: value for key, value in trained.items() if value is not None})
