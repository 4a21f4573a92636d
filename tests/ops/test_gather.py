"""Gathered rows against indexing."""

from __future__ import annotations

import pytest
import torch

from nybble.ops.gather import gather_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 1), (7, 24), (50, 5000)])
def test_rows(rows: int, hidden: int, dtype: torch.dtype) -> None:
    matrix, index = torch.randn(rows, hidden).to(dtype), torch.randint(rows, (11,))
    assert torch.equal(gather_rows(matrix, index), matrix[index])


def test_no_rows() -> None:
    assert gather_rows(torch.randn(3, 4), torch.empty(0, dtype=torch.int64)).shape == (0, 4)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_op_is_well_formed() -> None:
    torch.library.opcheck(gather_rows, (torch.randn(7, 24), torch.randint(7, (11,))))
