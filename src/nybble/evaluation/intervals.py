"""How far a figure can be trusted that was measured on some rows and is meant for all rows of their kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

LEVEL = 0.95
DRAWS = 4000  # the ends of a 95 % interval vary by about 2 % of its width from seed to seed
_DRAWN_AT_ONCE = 4_000_000  # row numbers: 32 MB


@dataclass(frozen=True)
class Interval:
    """level: of confidence. how: what was varied."""

    low: float
    high: float
    level: float
    how: str


def bootstrap_ratio(
    totals: Sequence[float], counts: Sequence[float], *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Percentile interval of sum(totals) / sum(counts) over rows drawn with replacement, as of a loss a token.

    totals, counts: of each row. Rows are drawn whole, because the tokens of one are not independent of each other.
    """
    rows = torch.tensor([list(totals), list(counts)], dtype=torch.float64)
    if rows.shape[1] == 0:
        raise ValueError("an interval needs at least one row")
    sums = _resampled_sums(rows, draws, seed)
    low, high = torch.quantile(sums[0] / sums[1], torch.tensor([(1 - level) / 2, (1 + level) / 2]).double()).tolist()
    return Interval(low, high, level, f"bootstrap over {rows.shape[1]} rows")


def bootstrap_mean(values: Sequence[float], *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0) -> Interval:
    return bootstrap_ratio(values, [1.0] * len(values), level=level, draws=draws, seed=seed)


def wilson_interval(right: int, questions: int, *, level: float = LEVEL) -> Interval:
    """Wilson's score interval of a share (1927). Unlike the bootstrap's it has a width where all or none are right."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = right / questions
    center = (share + z * z / (2 * questions)) / (1 + z * z / questions)
    half = z / (1 + z * z / questions) * math.sqrt(share * (1 - share) / questions + z * z / (4 * questions**2))
    low, high = max(0.0, center - half), min(1.0, center + half)
    return Interval(low, high, level, f"Wilson's interval over {questions} questions")


def _resampled_sums(rows: Tensor, draws: int, seed: int) -> Tensor:
    """Sums over as many drawn rows as there are: rows (figures, rows) -> (figures, draws)."""
    number = rows.shape[1]
    generator = torch.Generator().manual_seed(seed)
    sums, at_once = [], max(1, _DRAWN_AT_ONCE // number)
    for start in range(0, draws, at_once):
        drawn = torch.randint(number, (min(at_once, draws - start), number), generator=generator)
        sums.append(rows[:, drawn].sum(dim=-1))
    return torch.cat(sums, dim=1)
