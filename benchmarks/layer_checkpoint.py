"""16-bit checkpoints of a public shape, and adapters for them, written without ever holding the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import init_empty_weights
from make_model import write_tokenizer
from safetensors.torch import save_file
from shapes import shape_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from nybble.models.shards import ShardWriter, header_room

_BLOCK_VALUES = 2**25


def write_checkpoint(shape: str, folder: Path) -> None:
    """A folder of the shape with random weights in bf16, like `70b-8layers`; nothing is done if it is there."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    model = _skeleton(shape)
    noise = 0.02 * torch.randn(_BLOCK_VALUES, dtype=torch.bfloat16)
    tensors = model.state_dict()
    with ShardWriter(folder, header_room(list(tensors))) as writer:
        for name, tensor in tensors.items():
            norm = torch.ones(len(tensor), dtype=torch.bfloat16) if tensor.dim() == 1 else None
            blocks = iter([norm]) if norm is not None else _blocks(noise, tensor.numel())
            writer.add_blocks(name, torch.bfloat16, tuple(tensor.shape), blocks)
    write_tokenizer(folder)
    model.config.save_pretrained(folder)  # last: it says that all else is there


def write_adapter(shape: str, folder: Path, *, r: int = 16) -> None:
    """An adapter on all linears of the decoder, with a random B."""
    folder.mkdir(parents=True, exist_ok=True)
    linears = {
        path: module
        for path, module in _skeleton(shape).named_modules()
        if isinstance(module, nn.Linear) and path != "lm_head"
    }
    tensors: dict[str, Tensor] = {}
    for path, module in linears.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(r, module.in_features) / module.in_features**0.5
        tensors[f"base_model.model.{path}.lora_B.weight"] = 0.01 * torch.randn(module.out_features, r)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({path.rpartition(".")[2] for path in linears})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": r, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def _skeleton(shape: str) -> PreTrainedModel:
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(shape_config(shape))


def _blocks(noise: Tensor, numel: int) -> Iterator[Tensor]:
    """The same numbers over and over: what they are does not matter."""
    for start in range(0, numel, len(noise)):
        yield noise[: min(len(noise), numel - start)]
