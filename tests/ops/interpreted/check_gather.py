"""The kernel that gathers rows against its reference: copies are equal, bit for bit."""

from __future__ import annotations

import pytest
import torch

from nybble.ops.triton import gather as kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 1), (7, 24), (50, 5000)])
def test_agrees(rows: int, hidden: int, dtype: torch.dtype) -> None:
    matrix, index = torch.randn(rows, hidden).to(dtype), torch.randint(rows, (11,))
    assert torch.equal(kernels.gather_rows(matrix, index), matrix[index])


def test_no_rows_and_rows_that_are_not_there() -> None:
    matrix = torch.randn(5, 40)
    assert kernels.gather_rows(matrix, torch.empty(0, dtype=torch.int64)).shape == (0, 40)
    found = kernels.gather_rows(matrix, torch.tensor([4, 5, -1, 0]))
    assert torch.equal(found[[0, 3]], matrix[[4, 0]])
    assert found[1:3].isnan().all()
