"""The weight that does what a weight and its adapter do together: pure arithmetic on tensors.

Legend: in, out = the layer's features; r = rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.adapters.saved import LowRankPair

# Rows are merged so many bytes of fp32 at a time: beyond the weight itself, memory stays small whatever its size.
BLOCK_BYTES = 64 * 2**20


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


def merged_weight(
    weight: Tensor, pair: LowRankPair, dtype: torch.dtype | None = None, *, block_bytes: int = BLOCK_BYTES
) -> tuple[Tensor, MergeStats]:
    """W + scaling * B A (for DoRA with its rows rescaled to the magnitudes), computed in fp32 and rounded once.

    weight (out, in) in any floating-point dtype and on any device; the result is a new tensor in `dtype`, or in that
    of `weight`.
    """
    A, B = (tensor.to(weight.device, torch.float32) for tensor in (pair.A, pair.B))
    magnitude = None if pair.magnitude is None else pair.magnitude.to(weight.device, torch.float32)

    def exact(rows: slice) -> Tensor:
        changed = weight[rows].float() + pair.scaling * (B[rows] @ A)
        if magnitude is not None:
            changed *= (magnitude[rows] / torch.linalg.vector_norm(changed, dim=1)).unsqueeze(1)
        return changed

    return _rounded(weight, exact, dtype or weight.dtype, block_bytes)


def replaced_weight(
    weight: Tensor, trained: Tensor, dtype: torch.dtype | None = None, *, block_bytes: int = BLOCK_BYTES
) -> tuple[Tensor, MergeStats]:
    """`trained`, of the shape of `weight`, rounded once to `dtype`, with what that changes."""
    trained = trained.to(weight.device)
    return _rounded(weight, lambda rows: trained[rows].float(), dtype or weight.dtype, block_bytes)


def _rounded(
    weight: Tensor, exact: Callable[[slice], Tensor], dtype: torch.dtype, block_bytes: int
) -> tuple[Tensor, MergeStats]:
    """Round `exact`, the new rows in fp32, block by block, and count what became of the change."""
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    stats = MergeStats()
    for rows in _row_blocks(weight, block_bytes):
        changed, before = exact(rows), weight[rows].float()
        result[rows] = changed
        differs = changed != before
        stats += MergeStats(
            touched=int(differs.sum()),
            swallowed=int((differs & (result[rows] == before.to(dtype))).sum()),
            largest_delta=float((changed - before).abs().max()),
        )
    return result, stats


def _row_blocks(weight: Tensor, block_bytes: int) -> Iterator[slice]:
    row_bytes = 4 * weight.numel() // weight.shape[0]
    rows = max(1, block_bytes // row_bytes)
    for start in range(0, weight.shape[0], rows):
        yield slice(start, start + rows)
