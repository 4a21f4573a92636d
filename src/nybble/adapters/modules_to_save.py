"""Whole modules that an adapter trains and saves: norms, embeddings, the output head, single linears."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from nybble.adapters.config import LoraConfig
from nybble.adapters.lora import AdapterSlot, is_frozen_linear
from nybble.quant.linear import DenseLinear


class TrainableCopy(nn.Module):
    """A copy of one module with its weights in fp32; what it returns is in the precision of the rest of the model."""

    def __init__(self, original: nn.Module, config: LoraConfig) -> None:
        super().__init__()
        self.config = config
        self.trainable = True
        self.module = _fp32_copy(original)
        self._casts_itself = hasattr(original, "compute_dtype")
        self._held_dtype = next(original.parameters()).dtype

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._casts_itself:
            return self.module(x, *args, **kwargs)
        # A norm is given fp32, as its weights are, and hands back the dtype that it was given.
        if x.is_floating_point():
            return _cast(self.module(x.float(), *args, **kwargs), x.dtype)
        # An embedding is given indices: it returns what it was held in.
        return _cast(self.module(x, *args, **kwargs), self._held_dtype)


class ModulesToSave(AdapterSlot):
    """A module that adapters replace by their trained copies of it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.chosen or self.base)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Model code asks its layers for weight, eps, padding_idx and the like: those of the module that counts now.
        try:
            return super().__getattr__(name)
        except AttributeError:
            chosen = self.chosen
            return getattr(self.base if chosen is None else chosen.module, name)


def _fp32_copy(module: nn.Module) -> nn.Module:
    if is_frozen_linear(module):
        weight = nn.Parameter(module.dequantize(torch.float32).clone())
        bias = None if module.bias is None else nn.Parameter(module.bias.detach().float().clone())
        return DenseLinear.from_weight(weight, bias, module.compute_dtype, fan_in_fan_out=module.fan_in_fan_out)
    return copy.deepcopy(module).float()


def _cast(output: Any, dtype: torch.dtype) -> Any:
    # In fp32 storage the model narrows what such modules return by itself.
    return output.to(dtype) if isinstance(output, Tensor) and dtype != torch.float32 else output
