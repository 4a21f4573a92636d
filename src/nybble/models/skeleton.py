"""The model without its weights: built on the meta device, its linears and embeddings replaced by ours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from nybble.errors import UserError
from nybble.models.checkpoint import Checkpoint
from nybble.models.conversion import kept_in_fp32
from nybble.quant.linear import DenseEmbedding, DenseLinear

# Routers choose experts by small differences between logits, and hold few weights: they are never quantized.
_ROUTERS = {"gate", "router", "shared_expert_gate"}


@dataclass(frozen=True)
class Skeleton:
    """A model whose parameters are on the meta device, with its buffers real."""

    model: PreTrainedModel
    quantizable: frozenset[str]  # paths of the linears that NF4 may hold: neither the head nor a router

    @property
    def skipped(self) -> tuple[str, ...]:
        """Paths of the linears that NF4 may not hold."""
        linears = {name for name, module in self.model.named_modules() if _is_stock_linear(module)}
        return tuple(sorted(linears - self.quantizable))

    def is_transposed(self, path: str) -> bool:
        """Whether the checkpoint holds this linear's weight as (in, out)."""
        return isinstance(self.model.get_submodule(path), Conv1D)


def build_skeleton(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Skeleton:
    """The model that config.json describes, with stock modules.

    Raises UserError for a kind that Transformers does not know, and for code of the checkpoint's own that was not
    allowed to run.
    """
    config = _model_config(checkpoint, trust_remote_code=trust_remote_code)
    try:
        # Buffers stay real: they are not in the files, and fp32 so that rotary frequencies are not rounded.
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except (ImportError, ValueError) as error:
        raise UserError(f"the model cannot be built: {error}", where=checkpoint.folder) from error
    if (checkpoint.folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    return Skeleton(model, _quantizable(model))


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The tensors that hold the experts of a block together, (experts, ...): they are no linear layers' weights."""
    return {
        f"{path}.{leaf}": parameter
        for path, module in model.named_modules()
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 2
    }


def decoder_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The decoder layers of the model by their paths, in order; none if it does not hold them as a list."""
    wanted = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return {f"{path}.{index}": layer for index, layer in enumerate(module)}
    return {}


def replace_modules(model: PreTrainedModel, compute_dtype: torch.dtype) -> None:
    """Put ours in the place of every linear and plain embedding, with meta parameters of the right shapes."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            weight, bias = module.weight.t(), module.bias
            model.set_submodule(path, DenseLinear.from_weight(weight, bias, compute_dtype, fan_in_fan_out=True))
        elif _is_stock_linear(module):
            model.set_submodule(path, DenseLinear.from_linear(module, compute_dtype))
        elif isinstance(module, nn.Embedding):
            embedding = DenseEmbedding.from_embedding(module, compute_dtype)
            if embedding is not None:
                model.set_submodule(path, embedding)


def _model_config(checkpoint: Checkpoint, *, trust_remote_code: bool) -> PreTrainedConfig:
    kind = checkpoint.config.get("model_type")
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        if checkpoint.config.get("auto_map") and not trust_remote_code:
            fix = "Read that code, then allow it with --set model.trust_remote_code=true."
            raise UserError("needs Python code of its own to run", where=checkpoint.folder, fix=fix) from error
        what = f"Transformers does not know the kind of model {kind!r}, or its settings are wrong"
        raise UserError(what, where=checkpoint.folder / "config.json", fix=str(error).split("\n")[0]) from error
    own_class = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not own_class:
        raise UserError(f"{kind!r} is no causal language model", where=checkpoint.folder / "config.json")
    # Our modules hold the quantized weights; to Transformers the model is an ordinary one.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _quantizable(model: PreTrainedModel) -> frozenset[str]:
    head = model.get_output_embeddings()
    linears = {path for path, module in model.named_modules() if _is_stock_linear(module) and module is not head}
    # Transformers leaves those that a model wants in fp32 out as well.
    return frozenset(
        path
        for path in linears
        if path.rpartition(".")[2] not in _ROUTERS and not kept_in_fp32(model, path, torch.float16)
    )


def _is_stock_linear(module: nn.Module) -> bool:
    # Subclasses of nn.Linear have a forward of their own that need not be a product with `weight`.
    return type(module) is nn.Linear or isinstance(module, Conv1D)
