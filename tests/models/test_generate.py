"""Streamed answers against Transformers' own generation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nybble.adapters.config import LoraConfig
from nybble.adapters.inject import adapter_slots, inject
from nybble.errors import UserError
from nybble.models.config import ModelConfig
from nybble.models.generate import _pieces, stop_token_ids, stream_chat
from nybble.models.load import load_model
from tests.tiny import EOS, tiny_tokenizer

Tiny = Callable[..., Path]
QUESTION = [{"role": "user", "content": "What does add return?"}]
CPU = torch.device("cpu")


def loaded(folder: Path, storage: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = load_model(ModelConfig(name=str(folder), storage=storage), device=CPU)
    return model.model, model.tokenizer


def generated(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int = 24) -> str:
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False}
    ids = model.generate(**prompt, **options)[0, prompt["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


def add_random_adapter(model: PreTrainedModel) -> None:
    inject(model, LoraConfig(r=4, lora_alpha=12))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, slot in adapter_slots(model):
            b = slot.adapters["default"].lora_B
            b.copy_(torch.randn(b.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("storage", ["auto", "nf4"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text", "gpt2"])
def test_greedy_is_what_transformers_generates(tiny: Tiny, kind: str, storage: str) -> None:
    model, tokenizer = loaded(tiny(kind), storage)
    base = generated(model, tokenizer)
    assert "".join(stream_chat(model, tokenizer, QUESTION, max_new_tokens=24)) == base
    add_random_adapter(model.train())
    adapted = "".join(stream_chat(model, tokenizer, QUESTION, max_new_tokens=24))
    assert model.training
    assert adapted == generated(model.eval(), tokenizer)
    assert adapted != base


def test_it_stops_before_the_token_that_ends_the_turn(tiny: Tiny) -> None:
    model, tokenizer = loaded(tiny("llama"))
    whole = "".join(stream_chat(model, tokenizer, QUESTION, max_new_tokens=24))
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    model.generation_config.eos_token_id = [1, int(tokens[10])]
    first = tokens.tolist().index(int(tokens[10]))
    cut = "".join(stream_chat(model, tokenizer, QUESTION, max_new_tokens=24))
    assert cut == tokenizer.decode(tokens[:first])
    assert len(cut) < len(whole)


def test_the_end_of_a_turn_is_found_in_the_template(tiny: Tiny) -> None:
    """Where the tokenizer's EOS is another token, as in Llama 3 and Gemma."""
    model, tokenizer = loaded(tiny("llama"))
    template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|pad|>\n{% endfor %}"
    assert stop_token_ids(model, tokenizer, template) == {
        tokenizer.convert_tokens_to_ids("<|pad|>"),
        tokenizer.convert_tokens_to_ids(EOS),
    }
    plain = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert stop_token_ids(model, tokenizer, plain) == {tokenizer.convert_tokens_to_ids(EOS)}


def test_characters_of_several_tokens_come_whole() -> None:
    text = "naïve 漢字 🙂 ok, \U0001f469\u200d\U0001f680!"
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > len(text)  # bytes
    pieces = list(_pieces(tokenizer, iter(ids)))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert len(pieces) > 8
    assert "".join(_pieces(tokenizer, iter(ids[:-4] + ids[3:4]))) == tokenizer.decode(ids[:-4] + ids[3:4])


def test_pieces_come_while_later_tokens_are_not_made() -> None:
    tokenizer = tiny_tokenizer()
    made = 0

    def tokens() -> object:
        nonlocal made
        for token in tokenizer("one two three four")["input_ids"]:
            made += 1
            yield token

    assert next(_pieces(tokenizer, tokens())) == tokenizer.decode(tokenizer("one two three four")["input_ids"][:1])
    assert made == 1


def test_draws_repeat_with_a_seed_and_follow_temperature_and_top_p(tiny: Tiny) -> None:
    model, tokenizer = loaded(tiny("llama"))

    def answer(**options: float) -> str:
        return "".join(stream_chat(model, tokenizer, QUESTION, max_new_tokens=12, **options))

    greedy = answer()
    assert answer(temperature=1.0, seed=1) == answer(temperature=1.0, seed=1)
    assert answer(temperature=1.0, seed=1) != answer(temperature=1.0, seed=2)
    assert answer(temperature=1.0, top_p=1e-6, seed=3) == greedy
    assert answer(temperature=1e-4, seed=3) == greedy


def test_a_given_template_is_used_and_none_at_all_is_an_error(tiny: Tiny) -> None:
    model, tokenizer = loaded(tiny("llama"))
    ours = "{% for m in messages %}{{ m['content'] }}{% endfor %} ->"
    given = "".join(stream_chat(model, tokenizer, QUESTION, max_new_tokens=12, chat_template=ours))
    assert given != "".join(stream_chat(model, tokenizer, QUESTION, max_new_tokens=12))
    tokenizer.chat_template = None
    assert "".join(stream_chat(model, tokenizer, QUESTION, max_new_tokens=12, chat_template=ours)) == given
    with pytest.raises(UserError, match="no chat template"):
        stream_chat(model, tokenizer, QUESTION)


def test_messages_that_cannot_be_answered_are_refused(tiny: Tiny) -> None:
    model, tokenizer = loaded(tiny("gpt2"))
    no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}?"
    with pytest.raises(UserError, match="refuses the messages: no system role"):
        stream_chat(model, tokenizer, [{"role": "system", "content": "Be brief."}], chat_template=no_system)
    with pytest.raises(UserError, match="more than the model can read, 512"):
        stream_chat(model, tokenizer, [{"role": "user", "content": "0" * 600}])
    long = [{"role": "user", "content": "0" * 480}]
    prompt = tokenizer.apply_chat_template(long, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert len(prompt) < 512
    model.generation_config.eos_token_id = None
    "".join(stream_chat(model, tokenizer, long, max_new_tokens=100))  # as far as the positions go
