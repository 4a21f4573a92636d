"""The loss of a model, with or without an adapter, on rows that it was not trained on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nybble.adapters.report import count_parameters
from nybble.adapters.saved import read_adapter
from nybble.data.collate import Batch, collate
from nybble.data.config import DataConfig
from nybble.data.example import Example
from nybble.data.prepare import DataReport, prepare_data
from nybble.evaluation.batching import in_batches
from nybble.evaluation.intervals import Interval, bootstrap_ratio
from nybble.inference import open_for_inference
from nybble.models.config import ModelConfig
from nybble.models.device import compute_device
from nybble.models.load import LoadedModel
from nybble.models.loss import CausalLMLoss
from nybble.models.modes import evaluation_mode
from nybble.train.course import evaluation_batches
from nybble.train.memory import peak_device_bytes, peak_host_bytes, reset_peak


@dataclass(frozen=True)
class HeldOut:
    """loss: mean over the target tokens, in nats; its interval is over rows, for other rows of their kind.

    tokens_per_second: of the evaluation, prompts too, no padding.
    """

    loss: float
    loss_interval: Interval
    perplexity: float
    perplexity_interval: Interval
    rows: int
    target_tokens: int
    tokens_per_second: float
    storage: str
    parameters: int
    weight_bytes: int
    checkpoint_bytes: int
    peak_host_bytes: int
    peak_device_bytes: int


def measure_held_out(
    loaded: LoadedModel,
    examples: Sequence[Example],
    *,
    batch_size: int = 4,
    done: Callable[[int], None] = lambda _: None,
) -> HeldOut:
    """The loss of a loaded model on `examples`. done: told how many rows were finished, time after time."""
    device = compute_device(loaded.model)
    reset_peak(device)
    started = time.perf_counter()
    totals = row_losses(loaded, examples, batch_size=batch_size, done=done)
    seconds = time.perf_counter() - started
    counts = [example.target_tokens for example in examples]
    loss, interval = sum(totals) / sum(counts), bootstrap_ratio(totals, counts)
    low, high = perplexity(interval.low), perplexity(interval.high)
    return HeldOut(
        loss=loss,
        loss_interval=interval,
        perplexity=perplexity(loss),
        perplexity_interval=replace(interval, low=low, high=high),
        rows=len(examples),
        target_tokens=sum(counts),
        tokens_per_second=sum(map(len, examples)) / seconds,
        storage=loaded.storage,
        parameters=count_parameters(loaded.model).total,
        weight_bytes=loaded.weight_bytes,
        checkpoint_bytes=loaded.checkpoint.total_bytes,
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_bytes(device),
    )


def row_losses(
    loaded: LoadedModel,
    examples: Sequence[Example],
    *,
    batch_size: int = 4,
    done: Callable[[int], None] = lambda _: None,
    losses: CausalLMLoss | None = None,
) -> list[float]:
    """Of each row, the sum of the loss over its target tokens. losses: of the model, if there is one already."""
    losses, device = losses or CausalLMLoss(loaded.model), compute_device(loaded.model)

    def run(rows: list[Example]) -> list[float]:
        batch = collate(rows, pad_token_id=loaded.tokenizer.pad_token_id or 0).to(device)
        found: list[float] = losses.sequence_losses(batch.input_ids, batch.labels, batch.position_ids).tolist()
        return found

    with evaluation_mode(loaded.model):
        return in_batches(examples, run, length=len, batch_size=batch_size, done=done)


def held_out_examples(model: ModelConfig, adapter: Path | None, data: DataConfig) -> Sequence[Example]:
    """The rows of `prepare_held_out` alone."""
    return prepare_held_out(model, adapter, data)[0]


def prepare_held_out(
    model: ModelConfig, adapter: Path | None, data: DataConfig
) -> tuple[Sequence[Example], DataReport]:
    """The held-out rows of `data`, or all of its rows where it holds none out, as the model is to see them.

    And what became of them, as some may have been cut or left out. It reads no weights, so that a mistake in the data
    shows before they are loaded.
    """
    checkpoint, tokenizer = open_for_inference(model, read_adapter(adapter) if adapter else None)
    unpacked = data.model_copy(update={"packing": False})
    prepared = prepare_data(unpacked, tokenizer, model_max_length=checkpoint.max_positions)
    if prepared.validation_report is not None:
        return prepared.validation, prepared.validation_report
    return prepared.train, prepared.report


def held_out_batches(loaded: LoadedModel, examples: Sequence[Example], batch_size: int) -> list[Batch]:
    return list(evaluation_batches(examples, batch_size, pad_token_id=loaded.tokenizer.pad_token_id or 0))


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # e^709 is the largest a float holds
