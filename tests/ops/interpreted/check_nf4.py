"""NF4 kernels against their references. bf16 is left to the GPU: the interpreter truncates casts to it."""

from __future__ import annotations

import pytest
import torch

from nybble.ops.nf4 import absmax_quantize, nf4_dequantize, nf4_dequantize_stack_, nf4_quantize
from nybble.ops.triton import nf4 as kernels
from tests.ops.borders import values_beside_borders

# NumPy, which the interpreter computes with, warns of 1 / 0 and 0 * inf in blocks of zeros.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

# Whole tiles, a row end inside a block, an odd number of values, less than a block.
SHAPES = [(64, 128), (33, 100), (67, 31), (1, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_quantize(shape: tuple[int, int], block_size: int, dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    weight.view(-1)[:70] = 0
    found, expected = kernels.quantize(weight, block_size), nf4_quantize(weight, block_size)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_quantize_values_beside_a_border() -> None:
    weight = values_beside_borders(100)
    assert torch.equal(kernels.quantize(weight, 64)[0], nf4_quantize(weight, 64)[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group_size", [0, 4, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_dequantize(shape: tuple[int, int], group_size: int, dtype: torch.dtype) -> None:
    codes, absmax = nf4_quantize(torch.randn(shape), 64)
    stored = absmax_quantize(absmax, group_size) if group_size else (absmax, None, None)
    sizes = {"block_size": 64, "group_size": group_size}
    found = torch.full(shape, torch.nan, dtype=dtype)
    kernels.dequantize(found, codes, *stored, **sizes)
    assert torch.equal(found, nf4_dequantize(codes, *stored, **sizes, shape=shape, dtype=dtype))


@pytest.mark.parametrize("rows", [[64, 32, 32], [64, 3]], ids=["whole tiles", "a part of one"])
@pytest.mark.parametrize("group_size", [0, 256])
def test_dequantize_stack(rows: list[int], group_size: int) -> None:
    stored = []
    for count in rows:
        codes, absmax = nf4_quantize(torch.randn(count, 256), 64)
        stored.append((codes, *absmax_quantize(absmax, 256)) if group_size else (codes, absmax, None, None))
    lists = [[item for item in column if item is not None] for column in zip(*stored, strict=True)]
    sizes = [count * 256 for count in rows]
    found, expected = (torch.full((sum(rows), 256), torch.nan, dtype=torch.float16) for _ in range(2))
    kernels.dequantize_stack(found, sizes, *lists, block_size=64, group_size=group_size)
    nf4_dequantize_stack_(expected, sizes, *lists, block_size=64, group_size=group_size)
    assert torch.equal(found, expected)


def test_empty() -> None:
    codes, absmax = kernels.quantize(torch.empty(0, 64), 64)
    kernels.dequantize(torch.empty(0, 64), codes, absmax, None, None, block_size=64, group_size=0)


def test_not_a_number_reaches_absmax() -> None:
    weight = torch.randn(2, 64)
    weight[1, 5] = float("nan")
    assert kernels.quantize(weight, 64)[1].isfinite().tolist() == [True, False]
