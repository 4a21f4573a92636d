"""Columns quantized one after the other on a card: bit-equal to the references."""

from __future__ import annotations

import pytest
import torch

from nybble.ops.columns import quantize_columns, refit_columns
from tests.ops.columns_cases import SHAPES, open_columns

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shape", [*SHAPES, (1000, 64)])
def test_quantize(shape: tuple[int, int]) -> None:
    given = open_columns(*shape)
    found = quantize_columns(*(tensor.cuda() for tensor in given))
    for mine, expected in zip(found, quantize_columns(*given), strict=True):
        assert torch.equal(mine.cpu(), expected)


@pytest.mark.parametrize("shape", [*SHAPES, (1000, 64)])
def test_refit(shape: tuple[int, int]) -> None:
    pull, scales, metric = open_columns(*shape)
    given = torch.randint(16, shape, dtype=torch.uint8), scales, pull, metric
    found = refit_columns(*(tensor.cuda() for tensor in given))
    for mine, expected in zip(found, refit_columns(*given), strict=True):
        assert torch.equal(mine.cpu(), expected)
