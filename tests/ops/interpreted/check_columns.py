"""Kernels that quantize columns one after the other against their references."""

from __future__ import annotations

import pytest
import torch

from nybble.ops import columns
from nybble.ops.triton import columns as kernels
from tests.ops.columns_cases import SHAPES, open_columns

# NumPy, which the interpreter computes with, warns of a division by a scale of 0.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.mark.parametrize("shape", SHAPES)
def test_quantize(shape: tuple[int, int]) -> None:
    given = open_columns(*shape)
    for found, expected in zip(kernels.quantize_columns(*given), columns.quantize_columns(*given), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_refit(shape: tuple[int, int]) -> None:
    pull, scales, metric = open_columns(*shape)
    given = torch.randint(16, shape, dtype=torch.uint8), scales, pull, metric
    for found, expected in zip(kernels.refit_columns(*given), columns.refit_columns(*given), strict=True):
        assert torch.equal(found, expected)


def test_parts_of_a_matrix_and_no_rows() -> None:
    values, scales, factor = open_columns(40, 64)
    given = values[:, 8:24], scales[:, 8:24], factor[8:24, 8:24]
    for found, expected in zip(kernels.quantize_columns(*given), columns.quantize_columns(*given), strict=True):
        assert torch.equal(found, expected)
    assert [tuple(made.shape) for made in kernels.quantize_columns(values[:0], scales[:0], factor)] == 2 * [(0, 64)]
