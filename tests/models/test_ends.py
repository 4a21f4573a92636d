"""Embedding and head go to host memory as a plan says, or it is said why they cannot."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from nybble.adapters.config import LoraConfig
from nybble.adapters.inject import inject
from nybble.errors import UserError
from nybble.memory.host_matrix import HostEmbedding, HostLinear
from nybble.models.device import compute_device
from nybble.models.ends import place_ends
from nybble.models.generate import stream_chat
from nybble.models.skeleton import replace_modules
from nybble.plan import MemoryPlan, Place
from nybble.quant.linear import DenseEmbedding, DenseLinear
from tests.tiny import DENSE_KINDS, random_model, tiny_tokenizer

CPU = torch.device("cpu")


def plan(embedding: Place, head: Place) -> MemoryPlan:
    return MemoryPlan((), embedding=embedding, head=head)


def model_of(kind: str) -> PreTrainedModel:
    model = random_model(kind)
    replace_modules(model, torch.float32)
    return model.requires_grad_(False)


@pytest.mark.parametrize("kind", DENSE_KINDS)
def test_the_model_stays_the_same(kind: str) -> None:
    model = model_of(kind)
    ids = torch.arange(3, 23)[None]
    expected, names = model(input_ids=ids, use_cache=False).logits, list(model.state_dict())
    parameters = list(map(id, model.parameters()))
    for _ in range(2):  # the second time there is nothing to do
        place_ends(model, plan("host", "host"), CPU)
    assert type(model.get_input_embeddings()) is HostEmbedding
    assert type(model.get_output_embeddings()) is HostLinear
    assert list(model.state_dict()) == names
    assert list(map(id, model.parameters())) == parameters
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected)
    assert compute_device(model) == CPU


def test_each_end_by_itself() -> None:
    model = model_of("llama")
    place_ends(model, plan("device", "device"), CPU)
    assert type(model.lm_head) is DenseLinear
    place_ends(model, plan("host", "device"), CPU)
    assert type(model.lm_head) is DenseLinear
    assert type(model.model.embed_tokens) is HostEmbedding
    model = model_of("llama")
    place_ends(model, plan("device", "host"), CPU)
    assert type(model.lm_head) is HostLinear
    assert type(model.model.embed_tokens) is DenseEmbedding


@pytest.mark.parametrize("places", [("host", "device"), ("device", "host")])
def test_one_matrix_in_two_places(places: tuple[Place, Place]) -> None:
    with pytest.raises(UserError, match="one matrix"):
        place_ends(model_of("smollm"), plan(*places), CPU)


@pytest.mark.parametrize(
    ("settings", "places", "reason"),
    [
        ({"target_modules": ["o_proj", "lm_head"]}, ("device", "host"), "memory.head: the head .* trained"),
        ({"modules_to_save": ["lm_head"]}, ("device", "host"), "memory.head: the head .* trained"),
        ({"modules_to_save": ["embed_tokens"]}, ("host", "device"), "memory.embedding: the embedding .* trained"),
    ],
)
def test_what_is_trained_stays_on_the_device(
    settings: dict[str, object], places: tuple[Place, Place], reason: str
) -> None:
    model = model_of("llama")
    inject(model, LoraConfig(r=4, **settings))
    with pytest.raises(UserError, match=reason):
        place_ends(model, plan(*places), CPU)


def test_an_adapted_head_stays_on_the_device_even_if_nothing_is_trained() -> None:
    model = model_of("llama")
    inject(model, LoraConfig(r=4, target_modules=["o_proj", "lm_head"]))
    model.requires_grad_(False)
    with pytest.raises(UserError, match="the head cannot lie in host memory: it is a LoRALinear"):
        place_ends(model, plan("device", "host"), CPU)


def test_answers_are_the_same() -> None:
    model, tokenizer = model_of("qwen2"), tiny_tokenizer()
    question = [{"role": "user", "content": "What is 2?"}]
    expected = "".join(stream_chat(model, tokenizer, question, max_new_tokens=8))
    place_ends(model, plan("host", "host"), CPU)
    assert "".join(stream_chat(model, tokenizer, question, max_new_tokens=8)) == expected
