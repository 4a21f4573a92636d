"""Tiny random checkpoints: real Transformers models in which every weight shows in the logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

TOKENS = 400
VOCAB_SIZE = 408  # of the model: padded beyond the tokenizer's, as most are

BOS, EOS, PAD, START = "<|bos|>", "<|im_end|>", "<|pad|>", "<|im_start|>"

_DECODER = {
    "hidden_size": 64,
    "intermediate_size": 96,  # not a multiple of 64, so NF4 blocks cross the rows of down_proj
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_experts": 4}

# kind: (name of the configuration class in Transformers, what differs from its defaults)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _DECODER),
    "smollm": ("LlamaConfig", _DECODER | {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", _DECODER | {"sliding_window": 8, "head_dim": 16}),
    "qwen2": ("Qwen2Config", _DECODER | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", _DECODER | {"head_dim": 24}),
    "gemma2": ("Gemma2Config", _DECODER | _SLIDING | {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma3_text": ("Gemma3TextConfig", _DECODER | _SLIDING | {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3Config", _DECODER),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "mixtral": ("MixtralConfig", _DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2MoeConfig", _DECODER | _EXPERTS | {"shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("Qwen3MoeConfig", _DECODER | _EXPERTS | {"head_dim": 16, "mlp_only_layers": [0]}),
}

# The models that the project promises; those with experts show that merged weights load too.
DENSE_KINDS = ["llama", "smollm", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2"]

CHAT_TEMPLATE = """\
{{ bos }}{% for message in messages %}\
{% if message['role'] == 'assistant' %}\
{{ '<|im_start|>assistant\n' }}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}\
{% else %}\
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}\
{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

_CORPUS = [
    "The quick brown fox jumps over the lazy dog. What does this function return? It returns the sum of its parts.",
    "def add(first, second):\n    return first + second\n\nclass Animal:\n    def speak(self):\n        return 1",
    "A question is asked and an answer is given: the weather is fine, the model is small, the test is quick. 012345",
    "user assistant system\nHello there! How are you? I am well, thank you. Please say what you want.",
]


def tiny_model(
    kind: str,
    folder: Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
    sharded: bool = False,
    generation_marks: bool = False,
    add_bos: bool = False,
    **overrides: Any,
) -> Path:
    """Write a random checkpoint with its tokenizer into `folder` and return it; `overrides` go to the configuration."""
    model = random_model(kind, seed=seed, **overrides).to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    model.save_pretrained(folder, max_shard_size="100KB" if sharded else "5GB")
    tiny_tokenizer(generation_marks=generation_marks, add_bos=add_bos).save_pretrained(folder)
    return folder


def random_model(kind: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A Transformers model in fp32 whose biases and norm weights are random too, in evaluation mode."""
    name, values = KINDS[kind]
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    positions = {} if kind == "gpt2" else {"max_position_embeddings": 512}
    config = getattr(transformers, name)(**({"vocab_size": VOCAB_SIZE} | special | positions | values | overrides))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # sqrt(64) * 0.12 ~ 1: activations keep their size from layer to layer.
            parameter.copy_(noise * 0.12 if parameter.dim() > 1 else parameter + noise * 0.1)
    return model.eval()


def tiny_tokenizer(*, generation_marks: bool = False, add_bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens with a ChatML template.

    `generation_marks`: the template says which tokens the assistant speaks. `add_bos`: as in Llama 3, both the
    template and the tokenizer put a BOS in front.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=[BOS, EOS, PAD, START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", f"{BOS} $A $B", [(BOS, 0)])
    template = CHAT_TEMPLATE.replace("{{ bos }}", "{{ bos_token }}" if add_bos else "")
    if not generation_marks:
        template = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=template,
        model_max_length=512,
    )
