"""Columns that go together, with scales of both signs and of zero."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows and columns: whole tiles, parts of one, a single value.
SHAPES = [(64, 64), (37, 40), (5, 3), (1, 1)]


def open_columns(rows: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values, their scales, and how columns go together: a matrix with a diagonal above 1."""
    scales = torch.randn(rows, n)
    scales[0, 0] = 0
    mixed = torch.randn(n, n)
    return torch.randn(rows, n), scales, mixed @ mixed.t() / n + torch.eye(n)
