"""The precision in which half-precision tensors are summed, and products that are summed in it."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """fp32 for bf16, fp16 and fp32; fp64 for fp64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def add_product_(total: Tensor, a: Tensor, b: Tensor, factor: float = 1.0) -> None:
    """Add factor * a @ b to `total`, which is in the wide dtype of a and b, by the product itself."""
    if a.is_cuda and a.element_size() == 2:
        torch.addmm(total, a, b, out_dtype=torch.float32, alpha=factor, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), alpha=factor)
