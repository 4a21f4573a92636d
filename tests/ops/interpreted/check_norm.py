"""Kernels of RMS norm against PyTorch. bf16 is left to the GPU: the interpreter truncates casts to it."""

from __future__ import annotations

import pytest
import torch

from nybble.ops.triton import fp8
from nybble.ops.triton import norm as kernels
from tests.ops.test_norm import Inputs, check
from tests.ops.test_norm_fp8 import check_fp8


# Whole rows and rows in chunks; rows that end inside a tile; an odd width; chunks that come out even.
@pytest.mark.parametrize(
    ("shape", "r", "alone"),
    [
        *((shape, r, r == 3) for shape in [(37, 96), (9, 576), (19, 1111)] for r in (0, 3, 16, 40)),
        ((37, 96), 16, True),
        ((3, 2048), 16, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernels(shape: tuple[int, int], r: int, alone: bool, dtype: torch.dtype) -> None:
    check(kernels, Inputs.random(*shape, r, dtype, alone=alone))


# bf16 as well: how it is rounded does not matter here, but that it is.
@pytest.mark.parametrize("shape", [(37, 96), (9, 576), (19, 1111), (3, 2048)])
@pytest.mark.parametrize("r", [0, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rows_in_fp8(shape: tuple[int, int], r: int, dtype: torch.dtype) -> None:
    check_fp8(kernels, kernels, fp8.quantize_rows, Inputs.random(*shape, r, dtype, alone=r == 3))


def test_not_a_number_stays_in_its_row() -> None:
    x = Inputs.random(3, 96, 16, torch.float16)
    x.delta[1, 5] = torch.nan
    scale = kernels.add_norm_fp8(*x.added, x.weight, 1e-5, 0.0)[-1]
    assert scale.isfinite().view(-1).tolist() == [True, False, True]


def test_no_tokens() -> None:
    found = Inputs.random(0, 96, 3, torch.float32).outputs(kernels)
    assert [tuple(x.shape) for x in found.values()] == [(0, 96), (2, 0, 96), (2, 0), (0, 96)]


def test_rows_need_not_be_contiguous() -> None:
    inputs = Inputs.random(9, 96, 0, torch.float32)
    normed, rstd = kernels.norm(inputs.delta, inputs.weight, 1e-5, 0.0)
    strided = inputs.delta.T.contiguous().T
    assert all(map(torch.equal, kernels.norm(strided, inputs.weight, 1e-5, 0.0), (normed, rstd)))
