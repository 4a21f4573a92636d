"""Modules held in fp32 inside a model that computes in half precision.

PyTorch's norms refuse inputs of another dtype than their weights, and Transformers' would return fp32 to code that
expects the dtype of its inputs. So such a module is given fp32 and its result cast back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nybble.quant.linear import DenseEmbedding, DenseLinear, NF4Linear

# These cast by themselves, whatever their weights are held in.
_OURS = (DenseLinear, NF4Linear, DenseEmbedding)


def compute_in_fp32(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Cast the inputs of every module that owns fp32 parameters to fp32, and its outputs to the compute dtype."""
    for module in model.modules():
        owned = list(module.parameters(recurse=False))
        if not isinstance(module, _OURS) and any(parameter.dtype == torch.float32 for parameter in owned):
            module.register_forward_pre_hook(_widen)
            module.register_forward_hook(_Narrow(compute_dtype))


class _Narrow:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:  # noqa: ARG002
        if isinstance(output, tuple):
            return tuple(_cast(value, self.dtype) for value in output)
        return _cast(output, self.dtype)


def _widen(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ARG001
    return tuple(_cast(value, torch.float32) for value in args)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
