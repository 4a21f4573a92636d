"""Answers to several prompts at once against those that each prompt gets alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from nybble.models.config import ModelConfig
from nybble.models.generate_batch import generate_batch
from nybble.models.load import load_model
from tests.models.test_generate import add_random_adapter
from tests.tiny import TOKENS

Tiny = Callable[..., Path]


def loaded(folder: Path, storage: str = "auto") -> PreTrainedModel:
    return load_model(ModelConfig(name=str(folder), storage=storage), device=torch.device("cpu")).model


def prompts(seed: int, lengths: tuple[int, ...] = (3, 31, 12, 1)) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(4, TOKENS) for _ in range(length)] for length in lengths]


def alone(model: PreTrainedModel, prompt: list[int], max_new_tokens: int) -> list[int]:
    """As Transformers generates, without its stops."""
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": max_new_tokens, "do_sample": False}
    return model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("storage", ["auto", "nf4"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "gpt2", "qwen3_moe"])
def test_each_answer_is_the_one_that_its_prompt_gets_alone(tiny: Tiny, kind: str, storage: str) -> None:
    model = loaded(tiny(kind), storage)
    add_random_adapter(model.train())
    asked = prompts(seed=1)
    found = generate_batch(model, asked, max_new_tokens=12, stops=frozenset())
    assert model.training
    model.eval()
    assert found == [alone(model, prompt, 12) for prompt in asked]
    assert len(set(map(tuple, found))) == len(asked)


def test_answers_end_by_themselves(tiny: Tiny) -> None:
    model = loaded(tiny("llama"))
    asked = prompts(seed=2)
    whole = generate_batch(model, asked, max_new_tokens=20, stops=frozenset())
    stop = whole[1][7]
    assert generate_batch(model, asked, max_new_tokens=20, stops=frozenset([stop])) == [
        answer[: answer.index(stop)] if stop in answer else answer for answer in whole
    ]
    pair = whole[2][4:6]
    cut = generate_batch(model, asked, max_new_tokens=20, stops=frozenset(), ended=lambda tokens: tokens[-2:] == pair)
    assert cut[2][-2:] == pair
    assert len(cut[2]) <= 6


def test_no_answer_goes_beyond_the_models_positions(tiny: Tiny) -> None:
    model = loaded(tiny("gpt2"))  # learned positions: one too many is an error
    asked = prompts(seed=3, lengths=(505, 512, 20))
    found = generate_batch(model, asked, max_new_tokens=40, stops=frozenset())
    assert [len(answer) for answer in found] == [7, 0, 40]
    assert found[2] == alone(model, asked[2], 40)


def test_nothing_is_asked(tiny: Tiny) -> None:
    assert generate_batch(loaded(tiny("llama")), [], max_new_tokens=3, stops=frozenset()) == []
