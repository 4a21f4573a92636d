"""What a comparison measures of a trained model: its loss on each test row, its answers, and what merging costs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from nybble.adapters.saved import read_adapter
from nybble.compare.result import MergeResult
from nybble.data.example import Example
from nybble.evaluation.held_out import held_out_batches
from nybble.export.measure import ModelOutputs, measure_outputs
from nybble.export.merged import Measure, merge_checkpoint
from nybble.inference import load_for_inference
from nybble.models.config import ModelConfig
from nybble.models.device import compute_device
from nybble.models.generate import stop_token_ids
from nybble.models.generate_batch import generate_batch
from nybble.models.load import LoadedModel

# Of a row that is text from its beginning, this much is given and the rest is to be gone on with.
_TEXT_PROMPT_TOKENS = 48


def prompt_of(example: Example) -> tuple[Tensor, Tensor]:
    """A row as a question and its answer: the tokens before the first trained one, and from there on."""
    first = int(example.trained.int().argmax())
    if first <= 1:
        first = min(_TEXT_PROMPT_TOKENS, len(example) // 2)
    return example.input_ids[:first], example.input_ids[first:]


def questions(loaded: LoadedModel, examples: Sequence[Example]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Prompts and expected answers of `examples`, as text."""
    pairs = [prompt_of(example) for example in examples]
    prompts, expected = (tuple(_text(loaded, part.tolist()) for part in parts) for parts in zip(*pairs, strict=True))
    return prompts, expected


def answers(loaded: LoadedModel, examples: Sequence[Example], *, max_new_tokens: int) -> tuple[str, ...]:
    """What the model says to each row's prompt, greedily."""
    tokenizer = loaded.tokenizer
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    stops = stop_token_ids(loaded.model, tokenizer, template)
    prompts = [prompt_of(example)[0].tolist() for example in examples]
    said = generate_batch(loaded.model, prompts, max_new_tokens=max_new_tokens, stops=stops)
    return tuple(_text(loaded, tokens) for tokens in said)


def merge_results(
    model: ModelConfig, adapter: Path, examples: Sequence[Example], folder: Path, *, batch_size: int
) -> tuple[MergeResult, ...]:
    """Merge the adapter into each base there is for it, below `folder`, and measure; the merged models are removed."""
    loaded = load_for_inference(model, adapter)
    device, checkpoint = compute_device(loaded.model), loaded.checkpoint
    batches = held_out_batches(loaded, examples, batch_size)
    reference = measure_outputs(loaded.model, batches)
    del loaded

    def outputs(merged: Path) -> ModelOutputs:
        own = model.model_copy(update={"name": str(merged), "revision": None, "storage": "auto"})
        return measure_outputs(load_for_inference(own).model, batches)

    target = folder / "merged"
    shutil.rmtree(target, ignore_errors=True)
    try:
        report = merge_checkpoint(
            checkpoint, read_adapter(adapter), target, device=device, measure=Measure(outputs, reference)
        )
    finally:
        shutil.rmtree(target, ignore_errors=True)
    return tuple(
        MergeResult(base, found.adapter_loss, found.merged_loss, found.largest_logit_gap)
        for base, found in report.measured.items()
    )


def _text(loaded: LoadedModel, tokens: list[int]) -> str:
    return str(loaded.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
