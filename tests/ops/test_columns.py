"""Columns quantized one after the other, against their definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble.ops.columns import quantize_columns, refit_columns
from nybble.ops.nf4 import LEVELS
from tests.ops.columns_cases import SHAPES, open_columns

TABLE = torch.tensor(LEVELS, dtype=torch.float64)


def nearest(values: Tensor, scales: Tensor) -> Tensor:
    choices = TABLE * scales[:, None]
    found = (values[:, None] - choices).abs().argmin(1)
    return torch.where(scales == 0, 7, found)


@pytest.mark.parametrize("shape", SHAPES)
def test_errors_go_on_to_those_behind(shape: tuple[int, int]) -> None:
    given = open_columns(*shape)
    index, errors = quantize_columns(*given)
    values, scales, factor = (tensor.double() for tensor in given)
    for column in range(shape[1]):
        level = nearest(values[:, column], scales[:, column])
        assert torch.equal(index[:, column].long(), level)
        error = (values[:, column] - TABLE[level] * scales[:, column]) / factor[column, column]
        torch.testing.assert_close(errors[:, column].double(), error, rtol=1e-3, atol=1e-4)
        values[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]
    assert index.dtype == torch.uint8


@pytest.mark.parametrize("shape", SHAPES)
def test_each_is_the_best_beside_the_others(shape: tuple[int, int]) -> None:
    wanted, scales, metric = (tensor.double() for tensor in open_columns(*shape))
    index = torch.randint(16, shape, dtype=torch.uint8)
    values = TABLE[index.long()] * scales
    pull = (wanted - values) @ metric
    found, changes = refit_columns(index, scales.float(), pull.float(), metric.float())
    before = values.clone()
    for column in range(shape[1]):
        lacking = (wanted - values) @ metric[:, column] / metric[column, column]
        level = nearest(values[:, column] + lacking, scales[:, column])
        assert torch.equal(found[:, column].long(), level)
        values[:, column] = TABLE[level] * scales[:, column]
    torch.testing.assert_close(changes.double(), values - before, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_ops_are_well_formed() -> None:
    values, scales, factor = open_columns(5, 3)
    torch.library.opcheck(quantize_columns, (values, scales, factor))
    torch.library.opcheck(refit_columns, (torch.randint(16, (5, 3), dtype=torch.uint8), scales, values, factor))
