"""The weight that does what a weight and its adapter do together: pure arithmetic on tensors.

Legend: in, out = the layer's features; r = rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from nybble.adapters.saved import LowRankPair

# Rows are merged so many at a time: 64 MiB in fp32, so that memory stays small whatever the weight's size.
_BLOCK_VALUES = 2**24


@dataclass(frozen=True)
class MergeStats:
    """What happened to weights: how many had a change that is not zero, and of how many rounding left nothing."""

    touched: int = 0
    swallowed: int = 0
    largest_delta: float = 0.0

    def __add__(self, other: MergeStats) -> MergeStats:
        return MergeStats(
            self.touched + other.touched,
            self.swallowed + other.swallowed,
            max(self.largest_delta, other.largest_delta),
        )

    @property
    def swallowed_share(self) -> float:
        return self.swallowed / self.touched if self.touched else 0.0


def merged_weight(weight: Tensor, pair: LowRankPair, dtype: torch.dtype) -> tuple[Tensor, MergeStats]:
    """W + scaling * B A (for DoRA with its rows rescaled to the magnitudes), computed in fp32 and rounded to `dtype`.

    weight (out, in) in any floating-point dtype and on any device; some rows of one with those rows of its pair.
    """
    A, B = (tensor.to(weight.device, torch.float32) for tensor in (pair.A, pair.B))
    changed = weight.float() + pair.scaling * (B @ A)
    if pair.magnitude is not None:
        magnitude = pair.magnitude.to(weight.device, torch.float32)
        changed *= (magnitude / torch.linalg.vector_norm(changed, dim=1)).unsqueeze(1)
    return _rounded(weight, changed, dtype)


def replaced_weight(weight: Tensor, trained: Tensor, dtype: torch.dtype) -> tuple[Tensor, MergeStats]:
    """`trained`, of the shape of `weight`, rounded once to `dtype`, with what that changes."""
    return _rounded(weight, trained.to(weight.device).float(), dtype)


def row_blocks(shape: tuple[int, ...], *, multiple_of: int = 1) -> Iterator[slice]:
    """Rows of a weight of `shape` to be merged at a time: `multiple_of` so many, but for the last."""
    row_values = max(1, prod(shape[1:]))
    step = max(1, _BLOCK_VALUES // row_values // multiple_of) * multiple_of
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _rounded(weight: Tensor, changed: Tensor, dtype: torch.dtype) -> tuple[Tensor, MergeStats]:
    """Round the new rows, in fp32, and count what became of the change."""
    before, result = weight.float(), changed.to(dtype)
    differs = changed != before
    stats = MergeStats(
        touched=int(differs.sum()),
        swallowed=int((differs & (result == before.to(dtype))).sum()),
        largest_delta=float((changed - before).abs().max()) if changed.numel() else 0.0,
    )
    return result, stats
