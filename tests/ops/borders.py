"""Weights that are hard to quantize."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.ops.nf4 import levels, midpoints


def values_beside_borders(num_blocks: int) -> Tensor:
    """Blocks of 64: a peak, and for each border between levels the three fp32 values nearest to where it falls."""
    peak = torch.rand(num_blocks, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    at = midpoints(levels(torch.device("cpu"))) * peak
    beside = [torch.nextafter(at, torch.full_like(at, towards)) for towards in (-9.0, 9.0)]
    return torch.cat([peak, at, *beside, torch.zeros(num_blocks, 64 - 1 - 3 * 15)], dim=1)
