"""Sizes of public models, for benchmarks that need no trained weights."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

# With Llama 3.1's scaling of the rotation beyond 8,192 positions.
_LLAMA_3 = {
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_LLAMA_2 = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}

SHAPES: dict[str, dict[str, Any]] = {
    # For trying the benchmarks on a CPU.
    "tiny": _LLAMA_3
    | {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "vocab_size": 320}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "1b": _LLAMA_3
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
    | {"tie_word_embeddings": True},
    "3b": _LLAMA_3
    | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    | {"head_dim": 128, "tie_word_embeddings": True},
    "8b": _LLAMA_3 | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "70b": _LLAMA_3
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "13b": _LLAMA_2
    | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    # The first Llama, which QLoRA's paper fine-tunes in 48 GB.
    "65b": _LLAMA_2
    | {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64}
    | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "qwen3-4b": {
        "model_type": "qwen3",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
    },
}


def shape_config(name: str) -> PreTrainedConfig:
    """The configuration of a shape; `8b-2layers` is that of 8b with two layers."""
    base, _, layers = name.partition("-") if name.endswith("layers") else (name, "", "")
    sizes = dict(SHAPES[base])
    if layers:
        sizes["num_hidden_layers"] = int(layers.removesuffix("layers"))
    return AutoConfig.for_model(sizes.pop("model_type"), dtype="bfloat16", **sizes)
