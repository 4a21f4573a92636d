"""Answers, token by token, from any model that is loaded: dense or NF4, with adapters or without."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nybble.errors import UserError
from nybble.models.device import compute_device
from nybble.models.modes import evaluation_mode

Message = Mapping[str, Any]


def stream_chat(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    chat_template: str | None = None,
    seed: int | None = None,
) -> Iterator[str]:
    """The answer to `messages` in pieces of text, as its tokens come.

    temperature: 0 takes the likeliest token each time, else tokens are drawn, from the likeliest that have a share
    top_p between them; `seed` makes draws repeatable. chat_template: instead of the tokenizer's. It ends at
    max_new_tokens, or before a token that ends the text or the turn. Raises UserError where there is no chat template,
    where it refuses the messages, and where they are longer than the model can read.
    """
    template = chat_template or _own_template(tokenizer)
    prompt = _prompt(tokenizer, messages, template)
    limit = max_positions(model) - prompt.shape[1]
    if limit <= 0:
        raise UserError(f"{prompt.shape[1]} tokens are more than the model can read, {max_positions(model)}")
    pick = _Picker(temperature, top_p, seed, compute_device(model))
    stops = stop_token_ids(model, tokenizer, template)
    return _pieces(tokenizer, _tokens(model, prompt, pick, stops, min(max_new_tokens, limit)))


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: str | None) -> frozenset[int]:
    """Tokens that end an answer: the generation config's, the tokenizer's EOS, and the template's end of turn."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = configured if isinstance(configured, list) else [configured]
    end_of_turn = _end_of_turn(tokenizer, template) if template else None
    return frozenset(i for i in (*ids, tokenizer.eos_token_id, end_of_turn) if i is not None)


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        raise UserError(
            "the tokenizer has no chat template, so it is not known how a question is put to this model",
            where=tokenizer.name_or_path or None,
            fix="Give a chat template, or chat with an adapter: the template it was trained with is saved beside it.",
        ) from None


def _prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: str) -> Tensor:
    """(1, tokens)"""
    options: dict[str, Any] = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    try:
        encoded = tokenizer.apply_chat_template(list(messages), chat_template=template, **options)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template refuses the messages: {error}") from None
    return torch.as_tensor(encoded["input_ids"])


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, template: str) -> int | None:
    """The special token that the template puts right after what the assistant says, if it is one."""
    said = "…"  # in no template
    turns = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
    try:
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    except jinja2.TemplateError:
        return None
    after = tokenizer(text.rpartition(said)[2], add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    return after[0] if after and after[0] in added and added[after[0]].special else None


def max_positions(model: PreTrainedModel) -> int:
    """How many tokens the model can read, prompt and answer together."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize)


class _Picker:
    """Chooses the next token from logits (vocabulary,)."""

    def __init__(self, temperature: float, top_p: float, seed: int | None, device: torch.device) -> None:
        self.temperature = temperature
        self.top_p = top_p
        self.generator = torch.Generator(device)
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """(1,) int64."""
        if self.temperature == 0:
            return logits.argmax(dim=-1, keepdim=True)
        shares, tokens = torch.softmax(logits.float() / self.temperature, dim=-1).sort(descending=True)
        # A token stays if those before it do not yet have top_p between them, so the likeliest always does.
        shares = shares.masked_fill(shares.cumsum(0) - shares >= self.top_p, 0.0)
        return tokens[torch.multinomial(shares, 1, generator=self.generator)]


@torch.no_grad()
def _tokens(
    model: PreTrainedModel, prompt: Tensor, pick: _Picker, stops: frozenset[int], max_new_tokens: int
) -> Iterator[int]:
    """New tokens after `prompt` (1, tokens), with the keys and values of earlier ones kept."""
    name = cache_name(model)
    inputs, cache = prompt.to(compute_device(model)), None
    with evaluation_mode(model):
        for _ in range(max_new_tokens):
            output = model(input_ids=inputs, use_cache=True, logits_to_keep=1, **{name: cache})
            inputs, cache = pick(output.logits[0, -1])[None], getattr(output, name)
            token = int(inputs)
            if token in stops:
                return
            yield token


def cache_name(model: PreTrainedModel) -> str:
    """The name under which the model takes and gives the keys and values of earlier tokens."""
    # Transformers renamed it from past_key_values, model by model; code that comes with a checkpoint has the old name.
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _pieces(tokenizer: PreTrainedTokenizerBase, tokens: Iterator[int]) -> Iterator[str]:
    """Text of tokens as soon as it is certain: a character may take several, and a space may depend on the one before.

    `ids[start:given]` has been given out; it is decoded again with what follows, because tokenizers drop the space in
    front of a text's first word.
    """
    ids: list[int] = []
    start = given = 0
    for token in tokens:
        ids.append(token)
        before, text = _text(tokenizer, ids[start:given]), _text(tokenizer, ids[start:])
        if len(text) > len(before) and not text.endswith("\ufffd"):  # the mark of a character that is not complete
            yield text[len(before) :]
            start, given = given, len(ids)
    rest = _text(tokenizer, ids[start:])[len(_text(tokenizer, ids[start:given])) :]
    if rest:
        yield rest


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
