"""The loss of a model, with or without an adapter, on rows that it was not trained on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nybble.adapters.report import count_parameters
from nybble.adapters.saved import read_adapter
from nybble.data.collate import Batch
from nybble.data.config import DataConfig
from nybble.data.example import Example
from nybble.data.prepare import prepare_data
from nybble.inference import load_for_inference, open_for_inference
from nybble.models.config import ModelConfig
from nybble.models.device import compute_device
from nybble.models.load import LoadedModel
from nybble.models.loss import CausalLMLoss
from nybble.train.course import evaluation_batches
from nybble.train.evaluate import evaluate
from nybble.train.memory import peak_device_bytes, peak_host_bytes, reset_peak


@dataclass(frozen=True)
class HeldOut:
    """loss: mean over the target tokens, in nats. tokens_per_second: of the evaluation, prompts too, no padding."""

    loss: float
    perplexity: float
    rows: int
    target_tokens: int
    tokens_per_second: float
    storage: str
    parameters: int
    weight_bytes: int
    checkpoint_bytes: int
    peak_host_bytes: int
    peak_device_bytes: int


def held_out_loss(
    model: ModelConfig, data: DataConfig, *, adapter: Path | None = None, batch_size: int = 4, progress: bool = False
) -> HeldOut:
    """Evaluate on the held-out rows of `data`, or on all of its rows where it holds none out."""
    examples = held_out_examples(model, adapter, data)
    loaded = load_for_inference(model, adapter, progress=progress)
    device = compute_device(loaded.model)
    reset_peak(device)
    started = time.perf_counter()
    result = evaluate(CausalLMLoss(loaded.model), held_out_batches(loaded, examples, batch_size))
    return HeldOut(
        loss=result.loss,
        perplexity=result.perplexity,
        rows=len(examples),
        target_tokens=result.target_tokens,
        tokens_per_second=sum(map(len, examples)) / (time.perf_counter() - started),
        storage=loaded.storage,
        parameters=count_parameters(loaded.model).total,
        weight_bytes=loaded.weight_bytes,
        checkpoint_bytes=loaded.checkpoint.total_bytes,
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_bytes(device),
    )


def held_out_examples(model: ModelConfig, adapter: Path | None, data: DataConfig) -> Sequence[Example]:
    """The held-out rows of `data`, or all of its rows where it holds none out, as the model is to see them.

    It reads no weights, so that a mistake in the data shows before they are loaded.
    """
    checkpoint, tokenizer = open_for_inference(model, read_adapter(adapter) if adapter else None)
    unpacked = data.model_copy(update={"packing": False})
    prepared = prepare_data(unpacked, tokenizer, model_max_length=checkpoint.max_positions)
    return prepared.validation or prepared.train


def held_out_batches(loaded: LoadedModel, examples: Sequence[Example], batch_size: int) -> list[Batch]:
    return list(evaluation_batches(examples, batch_size, pad_token_id=loaded.tokenizer.pad_token_id or 0))
