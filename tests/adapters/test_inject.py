from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from nybble.adapters.config import LoraConfig
from nybble.adapters.inject import (
    adapter_config,
    adapter_names,
    adapter_parameters,
    disable_adapters,
    inject,
    set_adapter,
)
from nybble.adapters.report import count_parameters
from nybble.errors import UserError
from tests.adapters.support import gradients, load, logits, randomized

Tiny = Callable[..., Path]


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_fresh_adapter_changes_no_logit_and_alone_trains(tiny: Tiny) -> None:
    model = load(tiny("qwen2"))
    before = logits(model)
    inject(model, LoraConfig(r=4))
    assert torch.equal(logits(model), before)
    assert trainable(model) == set(adapter_parameters(model))
    assert set(gradients(model)) == trainable(model)


def test_report_counts_weights_not_bytes(tiny: Tiny) -> None:
    def total(storage: str) -> int:
        return count_parameters(load(tiny("gpt2"), storage)).total

    assert total("nf4") == total("fp32")
    model = load(tiny("llama"), "nf4")
    before = count_parameters(model).total
    report = inject(model, LoraConfig(r=4, target_modules=("q_proj", "down_proj"), exclude_modules=r".*0\.mlp.*"))
    assert report.layers["q_proj"] == (2, 2)
    assert report.layers["down_proj"] == (1, 2)
    assert report.layers["up_proj"] == (0, 2)
    assert report.partial == ("down_proj",)
    assert report.excluded == ("model.layers.0.mlp.down_proj",)
    assert report.untouched_blocks == ()
    added = 2 * 4 * (64 + 64) + 4 * (96 + 64)
    assert report.parameters.trainable == added
    assert report.parameters.total == before + added
    reached, linear = 2 * 64 * 64 + 96 * 64, 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96) + 408 * 64
    assert report.weight_share == pytest.approx(reached / linear)
    text = "\n".join(report.lines())
    assert "3 of 15 linear layers" in text
    assert "only some of: down_proj" in text


def test_tied_weights_are_counted_once(tiny: Tiny) -> None:
    model = load(tiny("smollm"))
    assert count_parameters(model).total == sum(parameter.numel() for parameter in model.parameters())


def test_blocks_without_adapter_are_reported(tiny: Tiny) -> None:
    report = inject(load(tiny("llama")), LoraConfig(target_modules=r".*layers\.0\..*_proj"))
    assert report.untouched_blocks == ("model.layers.1",)
    assert "blocks without any adapter: model.layers.1" in "\n".join(report.lines())
    both = inject(load(tiny("gpt2")), LoraConfig(target_modules="attention"))
    assert both.layers["attn.c_proj"] == (2, 2)
    assert both.partial == ()


def test_several_adapters_on_one_base(tiny: Tiny) -> None:
    model = load(tiny("smollm"))
    base = logits(model)
    inject(model, LoraConfig(r=4, target_modules="attention"), name="first")
    first = logits(randomized(model, "first", seed=1))
    inject(model, LoraConfig(r=2, target_modules=("up_proj", "q_proj"), modules_to_save=("norm",)), name="second")
    second = logits(randomized(model, "second", seed=2))
    assert adapter_names(model) == ("first", "second")
    assert adapter_config(model, "second").r == 2
    assert trainable(model) == set(adapter_parameters(model, "second"))
    assert len({tuple(each.flatten().tolist()) for each in (base, first, second)}) == 3

    set_adapter(model, "first")
    assert torch.equal(logits(model), first)
    assert trainable(model) == set(adapter_parameters(model, "first"))
    set_adapter(model, "second")
    assert torch.equal(logits(model), second)
    with disable_adapters(model):
        assert torch.equal(logits(model), base)
        with disable_adapters(model):
            pass
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), second)
    with pytest.raises(UserError, match="it has: first, second"):
        set_adapter(model, "third")


def test_adapters_come_back_after_an_error(tiny: Tiny) -> None:
    model = load(tiny("llama"))
    inject(model, LoraConfig(r=4))
    adapted = logits(randomized(model))
    with pytest.raises(RuntimeError, match="inside"), disable_adapters(model):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), adapted)


def test_start_of_a_layer_does_not_depend_on_other_layers(tiny: Tiny) -> None:
    key = "model.layers.1.self_attn.q_proj.adapters.default.lora_A"
    starts = []
    for targets, seed in ((("q_proj",), 0), (("k_proj", "q_proj", "up_proj"), 0), (("q_proj",), 1)):
        model = load(tiny("llama"))
        inject(model, LoraConfig(r=4, target_modules=targets), seed=seed)
        starts.append(adapter_parameters(model)[key].detach())
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    other = adapter_parameters(model)[key.replace("layers.1", "layers.0")]
    assert not torch.equal(starts[2], other)


@pytest.mark.parametrize("name", ["a.b", "", "keys", "two words"])
def test_names_that_cannot_be(tiny: Tiny, name: str) -> None:
    with pytest.raises(UserError, match="cannot name an adapter"):
        inject(load(tiny("llama")), LoraConfig(), name=name)


def test_a_layer_is_adapted_or_trained_whole(tiny: Tiny) -> None:
    model = load(tiny("llama"))
    inject(model, LoraConfig(target_modules=("q_proj",)), name="low")
    with pytest.raises(UserError, match="already has an adapter 'low'"):
        inject(model, LoraConfig(), name="low")
    with pytest.raises(UserError, match="in another way"):
        inject(model, LoraConfig(target_modules=("k_proj",), modules_to_save=("q_proj",)), name="whole")
    assert adapter_names(model) == ("low",)


def test_adapted_head_leaves_the_tied_embedding_alone(tiny: Tiny) -> None:
    model = load(tiny("smollm"))
    embedding = model.get_input_embeddings().weight
    before = embedding.clone()
    inject(model, LoraConfig(r=4, target_modules=("lm_head",)))
    base = logits(model)
    randomized(model)
    assert (logits(model) - base).abs().max() > 0.05
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert model.get_output_embeddings().weight is embedding


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_lie_where_they_are_wanted(tiny: Tiny, use_dora: bool) -> None:
    """Weights in host memory are adapted by pairs on the device that computes."""
    model = load(tiny("llama"))
    inject(model, LoraConfig(use_dora=use_dora), device=torch.device("meta"))
    assert {parameter.device.type for parameter in adapter_parameters(model).values()} == {"meta"}
