"""A Llama model in a GGUF file, written out as an ordinary checkpoint folder with bf16 weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

from nybble.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_A_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(file: Path, folder: Path) -> None:
    """Dequantize the Llama model in `file` and write it, its tokenizer and its chat template into `folder`.

    Each weight is dequantized in fp32 and rounded once to bf16.
    """
    from gguf import GGUFReader  # an extra of the package: `pip install nybble[demo]`

    reader = GGUFReader(file)
    config = _config(reader)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in _weights(reader, config)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    special = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**special).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    for name, number in special.items():  # Transformers 5.17 takes the first for the end too, and no padding
        setattr(tokenizer, name.removesuffix("_id"), tokenizer.convert_ids_to_tokens(number))
    tokenizer.model_max_length = config.max_position_embeddings  # GGUF's tokenizer part does not say it
    tokenizer.save_pretrained(folder)


def _config(reader: GGUFReader) -> LlamaConfig:
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise UserError(f"holds a model of kind {architecture!r}, not 'llama'", where=reader.data.filename)
    names = {tensor.name for tensor in reader.tensors}
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=len(_field(reader, "tokenizer.ggml.tokens")),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=_field(reader, "llama.attention.head_count"),
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        rms_norm_eps=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": _field(reader, "llama.rope.freq_base")},
        tie_word_embeddings="output.weight" not in names,
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
    )


def _field(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise UserError(f"has no field {name!r}", where=reader.data.filename)
    return field.contents()


def _weights(reader: GGUFReader, config: LlamaConfig) -> Iterator[tuple[str, torch.Tensor]]:
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for tensor in reader.tensors:
        weight = _dequantize(tensor)
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if block is None:
            yield _OUTER[tensor.name], weight
            continue
        layer, part = block.groups()
        if part in heads:
            weight = _halves_from_pairs(weight, heads[part])
        yield f"model.layers.{layer}.{_IN_A_BLOCK[part]}.weight", weight


def _dequantize(tensor: ReaderTensor) -> torch.Tensor:
    from gguf.quants import dequantize

    return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())


def _halves_from_pairs(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo llama.cpp's order of q and k (out, in): it rotates neighbours, Transformers the two halves of a head."""
    out, width = weight.shape
    pairs = weight.view(num_heads, out // num_heads // 2, 2, width)
    return pairs.transpose(1, 2).reshape(out, width).contiguous()
