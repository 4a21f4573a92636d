"""Sizes read from config.json alone are those of the models that Transformers builds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from nybble.errors import UserError
from nybble.planner.shapes import ModelShape, gpt3

_SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4}
_GROUPED = {**_SMALL, "num_key_value_heads": 2, "vocab_size": 300}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_GROUPED},
    "llama, biased and tied": {
        "model_type": "llama", **_GROUPED, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
    },
    "llama, heads of their own size": {"model_type": "llama", **_GROUPED, "head_dim": 24},
    "llama, no shared keys": {"model_type": "llama", **_SMALL, "vocab_size": 300},
    "mistral": {"model_type": "mistral", **_GROUPED, "sliding_window": 32},
    "qwen2": {"model_type": "qwen2", **_GROUPED, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **_GROUPED, "head_dim": 32},
    "gemma2": {"model_type": "gemma2", **_GROUPED, "head_dim": 32},
    "gemma3": {"model_type": "gemma3_text", **_GROUPED, "head_dim": 32},
    "phi3": {"model_type": "phi3", **_GROUPED, "pad_token_id": 0},
}  # fmt: skip


def stock(config: dict[str, Any]) -> nn.Module:
    settings = dict(config)
    made: PretrainedConfig = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(made)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters(name: str) -> None:
    model, shape = stock(CONFIGS[name]), ModelShape.from_config(CONFIGS[name])
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_linears_of_a_block(name: str) -> None:
    layers = stock(CONFIGS[name]).base_model.layers  # type: ignore[union-attr]
    found = {
        path.rpartition(".")[2]: (module.in_features, module.out_features, module.bias is not None)
        for path, module in layers[0].named_modules()  # type: ignore[index,union-attr]
        if isinstance(module, nn.Linear)
    }
    linears = ModelShape.from_config(CONFIGS[name]).linears
    assert {linear.name: (linear.inputs, linear.outputs, linear.bias) for linear in linears} == found


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gemma3", "mistral"])
def test_windows_are_those_of_the_written_config(name: str) -> None:
    """As config.json has it, which leaves out little, and from the few lines of old ones."""
    config = CONFIGS[name] | {"num_hidden_layers": 7, "sliding_window": 32, "use_sliding_window": True}
    config |= {"max_window_layers": 3} if name == "qwen2" else {}
    settings = dict(config)
    made = AutoConfig.for_model(settings.pop("model_type"), **settings)
    kinds = getattr(made, "layer_types", None) or ["sliding_attention"] * 7
    expected = tuple(32 if kind == "sliding_attention" else None for kind in kinds)
    assert ModelShape.from_config(config).windows == ModelShape.from_config(made.to_dict()).windows == expected


def test_a_model_of_images_and_text_is_its_decoder() -> None:
    text = CONFIGS["gemma3"]
    assert ModelShape.from_config({"model_type": "gemma3", "text_config": text}) == ModelShape.from_config(text)


def test_unknown_models_are_refused() -> None:
    with pytest.raises(UserError, match="mamba"):
        ModelShape.from_config({"model_type": "mamba"})


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_a_size_that_is_left_out_is_named(key: str) -> None:
    config = {name: value for name, value in CONFIGS["mistral"].items() if name != key}
    with pytest.raises(UserError, match=rf"config\.json: does not say '{key}'"):
        ModelShape.from_config(config)


def test_gpt3_of_the_lora_paper() -> None:
    model = gpt3()
    assert 174e9 < model.parameters < 176e9


def test_parameters_of_8b() -> None:
    shape = ModelShape.from_config(
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        }
    )
    assert shape.parameters == 8_030_261_248
