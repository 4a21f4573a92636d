"""A GGUF file written with the real writer becomes a checkpoint that computes what the original model does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from nybble.demo.gguf import convert_gguf
from nybble.errors import UserError
from tests.tiny import BOS, CHAT_TEMPLATE, EOS, PAD, START, random_model, tiny_tokenizer

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}.get(
            name, "output.weight"
        )
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{LAYER[part]}.weight"


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of q and k, as its own converter writes it."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(model: PreTrainedModel, file: Path, *, architecture: str = "llama") -> dict[str, np.ndarray]:
    """Write `model` with Q4_1 matrices; returns the weights that can be read back, by our names."""
    config = model.config
    writer = GGUFWriter(file, architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    _write_tokenizer(writer, config.vocab_size)
    stored = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        value = permuted(value, heads) if heads else value
        kind = GGMLQuantizationType.Q4_1 if value.ndim == 2 else GGMLQuantizationType.F32
        packed = quantize(np.ascontiguousarray(value), kind)
        writer.add_tensor(gguf_name(name), packed, raw_dtype=kind)
        known = dequantize(packed, kind)
        stored[name] = known if not heads else _natural(known, heads)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def _natural(weight: np.ndarray, heads: int) -> np.ndarray:
    order = permuted(np.arange(len(weight))[:, None], heads)[:, 0]
    natural = np.empty_like(weight)
    natural[order] = weight
    return natural


def _write_tokenizer(writer: GGUFWriter, vocab_size: int) -> None:
    tokenizer = tiny_tokenizer()
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    tokens += [f"<unused{i}>" for i in range(vocab_size - len(tokens))]
    kinds = [TokenType.CONTROL if token in (BOS, EOS, PAD, START) else TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    # One merge per token of two or more characters whose halves are known, as a byte-level BPE must have.
    writer.add_token_merges([f"{t[:i]} {t[i:]}" for t in tokens for i in range(1, len(t)) if _splits(t, i, tokens)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE.replace("{{ bos }}", ""))


def _splits(token: str, at: int, tokens: list[str]) -> bool:
    return not token.startswith("<") and token[:at] in tokens and token[at:] in tokens


@pytest.mark.parametrize("kind", ["llama", "smollm"])  # the second has tied embeddings and one key-value head
def test_weights_and_logits_are_the_originals(kind: str, tmp_path: Path) -> None:
    model = random_model(kind, seed=3)
    stored = write_gguf(model, tmp_path / "tiny.gguf")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")

    converted = load_file(tmp_path / "out" / "model.safetensors")
    assert converted.keys() == stored.keys()
    for name, value in stored.items():
        assert torch.equal(converted[name], torch.from_numpy(value.copy()).bfloat16()), name

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = {name: torch.from_numpy(value.copy()).bfloat16().float() for name, value in stored.items()}
    model.load_state_dict(expected, strict=not model.config.tie_word_embeddings)
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_tokenizer_and_template_come_along(tmp_path: Path) -> None:
    write_gguf(random_model("llama"), tmp_path / "tiny.gguf")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == (EOS, PAD, 512)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hello there!"}], tokenize=False)
    assert text == f"{START}user\nHello there!{EOS}\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    write_gguf(random_model("llama"), tmp_path / "tiny.gguf", architecture="mamba")
    with pytest.raises(UserError, match="'mamba'"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
