"""The precision in which half-precision tensors are summed."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """fp32 for bf16, fp16 and fp32; fp64 for fp64."""
    return torch.promote_types(tensor.dtype, torch.float32)
