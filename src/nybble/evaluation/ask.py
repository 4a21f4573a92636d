"""What a model says to many prompts, and how likely it finds many texts, as many at a time as memory has room for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nybble.data.collate import collate
from nybble.data.example import Example
from nybble.evaluation.batching import in_batches
from nybble.models.device import compute_device
from nybble.models.generate import stop_token_ids
from nybble.models.generate_batch import generate_batch
from nybble.models.likelihood import Likelihood, target_likelihoods
from nybble.models.loss import CausalLMLoss

BATCH_SIZE = 16


class Said(NamedTuple):
    """text: without special tokens. num_tokens: that were generated."""

    text: str
    num_tokens: int


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    chat_template: str | None,
    max_new_tokens: int,
    batch_size: int = BATCH_SIZE,
    ended: Callable[[list[int]], bool] = lambda _: False,
    done: Callable[[int], None] = lambda _: None,
) -> list[Said]:
    """The likeliest answer to each prompt, which is given as tokens.

    chat_template: what the prompts were rendered with, whose end of turn ends an answer; None if they are plain text.
    ended: as `generate_batch` takes it. done: told how many prompts were finished, time after time.
    """
    stops = stop_token_ids(model, tokenizer, chat_template)

    def generate(batch: list[Sequence[int]]) -> list[list[int]]:
        return generate_batch(model, batch, max_new_tokens=max_new_tokens, stops=stops, ended=ended)

    answers = in_batches(prompts, generate, length=len, batch_size=batch_size, done=done)
    return [Said(text_of(tokenizer, tokens), len(tokens)) for tokens in answers]


def likelihoods(
    loss: CausalLMLoss,
    examples: Sequence[Example],
    *,
    batch_size: int = BATCH_SIZE,
    done: Callable[[int], None] = lambda _: None,
) -> list[Likelihood]:
    """Of each example's target tokens. done: told how many examples were finished, time after time."""
    device = compute_device(loss)

    def run(rows: list[Example]) -> list[Likelihood]:
        batch = collate(rows).to(device)
        return target_likelihoods(loss, batch.input_ids, batch.labels, batch.position_ids)

    return in_batches(examples, run, length=len, batch_size=batch_size, done=done)


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))
