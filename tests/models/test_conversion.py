"""Names and shapes between files and models, and every internal of Transformers that they rest on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, conversion_mapping, core_model_loading

from nybble.errors import UserError
from nybble.models.checkpoint import Checkpoint
from nybble.models.config import ModelConfig
from nybble.models.conversion import ParameterMap, attention_implementation, kept_in_fp32
from nybble.models.load import load_model
from nybble.models.skeleton import build_skeleton
from tests.tiny import DENSE_KINDS

Tiny = Callable[..., Path]


def mapped(folder: Path) -> tuple[Checkpoint, PreTrainedModel, ParameterMap]:
    checkpoint = Checkpoint.open(str(folder))
    model = build_skeleton(checkpoint).model
    return checkpoint, model, ParameterMap.build(model, checkpoint.weights)


def test_contract_with_transformers() -> None:
    """What nybble.models.conversion uses beyond the documented interface: a failure here means that it moved."""
    parameters = inspect.signature(core_model_loading.rename_source_key).parameters
    assert list(parameters)[:5] == [
        "source_key",
        "weight_renamings",
        "weight_converters",
        "base_model_prefix",
        "meta_state_dict",
    ]
    assert list(inspect.signature(core_model_loading.revert_weight_conversion).parameters) == ["model", "state_dict"]
    assert next(iter(inspect.signature(conversion_mapping.get_model_conversion_mapping).parameters)) == "model"
    assert sorted(["a.10", "a.9"], key=core_model_loading.dot_natural_key) == ["a.9", "a.10"]
    converter = core_model_loading.WeightConverter("a", "b", operations=[core_model_loading.Transpose(0, 1)])
    assert list(inspect.signature(converter.add_tensor).parameters)[:3] == [
        "target_key",
        "source_key",
        "source_pattern",
    ]
    converter.add_tensor("b", "a", "a", torch.ones(2, 3))
    assert converter.convert("b")["b"].shape == (3, 2)
    assert converter.source_patterns == ["a"]
    assert converter.target_patterns == ["b"]
    assert isinstance(core_model_loading.WeightRenaming("a", "b"), core_model_loading.WeightTransform)
    for name in (
        "_keys_to_ignore_on_load_missing",
        "_keys_to_ignore_on_load_unexpected",
        "_keep_in_fp32_modules",
        "_keep_in_fp32_modules_strict",
    ):
        assert hasattr(PreTrainedModel, name), name
    config = LlamaConfig(attn_implementation="eager")
    assert attention_implementation(config) == "eager"


def test_tied_parameters_are_declared_by_target(tiny: Tiny) -> None:
    _, model, _ = mapped(tiny("smollm"))
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize("kind", DENSE_KINDS)
def test_every_parameter_has_one_key(tiny: Tiny, kind: str) -> None:
    checkpoint, model, names = mapped(tiny(kind))
    names.require_complete(kind)
    assert set(names.parameter_of) == set(checkpoint.weights)
    assert set(names.key_of) == set(model.state_dict())
    assert all(names.parameter_of[key] == name for name, key in names.key_of.items() if name not in names.ties)


def test_experts_are_merged_in_the_order_of_their_numbers(tiny: Tiny) -> None:
    folder = tiny("mixtral", num_local_experts=12)
    checkpoint, _, names = mapped(folder)
    merge = next(entry for entry in names.assignments if entry.parameters == ("model.layers.0.mlp.experts.down_proj",))
    assert not merge.is_rename
    assert [int(key.split(".experts.")[1].split(".")[0]) for key in merge.keys] == list(range(12))
    loaded = load_model(ModelConfig(name=str(folder)), device=torch.device("cpu"))
    expected = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in expected.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), parameter), name
    assert set(names.parameter_of).isdisjoint(merge.keys)
    assert all(key in checkpoint.keys for key in merge.keys)


def test_what_does_not_fit_is_listed(tiny: Tiny) -> None:
    checkpoint, model, _ = mapped(tiny("llama"))
    keys = [key for key in checkpoint.weights if key != "lm_head.weight"] + ["score.weight"]
    names = ParameterMap.build(model, keys)
    assert names.leftover == ("score.weight",)
    assert names.unfilled == ("lm_head.weight",)
    with pytest.raises(UserError, match=r"no place for: score\.weight\n.*no tensor fills: lm_head\.weight"):
        names.require_complete("here")


def test_buffers_that_the_model_computes_need_no_place(tiny: Tiny) -> None:
    checkpoint, model, _ = mapped(tiny("llama"))
    model.model.register_buffer("causal_mask", torch.ones(1), persistent=False)
    keys = [*checkpoint.weights, "model.causal_mask", "causal_mask", "model.layers.0.causal_mask"]
    assert ParameterMap.build(model, keys).leftover == ("model.layers.0.causal_mask",)


def test_a_tie_follows_whichever_name_the_file_has(tiny: Tiny) -> None:
    checkpoint, model, _ = mapped(tiny("smollm"))
    keys = ["lm_head.weight" if key == "model.embed_tokens.weight" else key for key in checkpoint.weights]
    names = ParameterMap.build(model, keys)
    assert names.unfilled == ()
    assert names.ties == {"model.embed_tokens.weight": "lm_head.weight"}
    assert names.key_of["model.embed_tokens.weight"] == "lm_head.weight"


def test_fp32_modules_are_found_by_whole_names(tiny: Tiny) -> None:
    _, model, _ = mapped(tiny("llama"))
    model._keep_in_fp32_modules = {"norm"}
    assert kept_in_fp32(model, "model.norm.weight", torch.float16)
    assert not kept_in_fp32(model, "model.norm.weight", torch.bfloat16)
    assert not kept_in_fp32(model, "model.layers.0.input_layernorm.weight", torch.float16)
