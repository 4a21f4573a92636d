"""fp8 kernels against their references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble.ops.fp8 import E4M3, fp8_quantize_rows
from nybble.ops.triton import fp8 as kernels
from tests.ops.test_fp8 import dequantized_nf4, empty_values, quantized_weight, stored_weight

# NumPy, which the interpreter computes with, warns of NaN that is compared and cast.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal, but for what the interpreter of Triton 3.7 gets wrong when it rounds to e4m3.

    It loses a carry into the exponent, so that a power of two comes out as its half; it rounds what lies between an
    even number and the next one up; and below 2**-6 it truncates.
    """
    steps_above = found.contiguous().view(torch.uint8).int() - expected.contiguous().view(torch.uint8).int()
    found, expected = found.float(), expected.float()
    lost_carry = (torch.frexp(expected).mantissa.abs() == 0.5) & (found == expected / 2)
    tie = (steps_above == 1) & (expected.to(E4M3).view(torch.uint8) % 2 == 0)
    truncated = (expected.abs() <= 2.0**-6) & ((found - expected).abs() <= 2.0**-9)
    assert ((found == expected) | lost_carry | tie | truncated).all()


# A row in registers, a part of a block, and a row that is read twice.
@pytest.mark.parametrize("shape", [(3, 512), (4, 99), (2, 20000)])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows(shape: tuple[int, int], scaled: bool, dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    x[1] = 0
    column_scale = torch.rand(shape[1]) if scaled else None
    values, scale = kernels.quantize_rows(x, column_scale)
    expected_values, expected_scale = fp8_quantize_rows(x, column_scale)
    assert torch.equal(scale, expected_scale)
    assert_same(values, expected_values)


@pytest.mark.parametrize("columns", [64, 20000])
def test_rows_that_are_exact_in_e4m3(columns: int) -> None:
    expected = torch.arange(0, 127, dtype=torch.uint8).view(E4M3).float().repeat(columns // 127 + 1)[-columns:]
    x = torch.stack([expected.div(8).half(), expected.neg().half()])
    values, scale = kernels.quantize_rows(x, None)
    assert torch.equal(values.float() * scale, x.float())


def test_not_a_number_stays_in_its_row() -> None:
    x = torch.ones(2, 64)
    x[1, 3] = torch.nan
    values, scale = kernels.quantize_rows(x, None)
    assert scale.isfinite().view(-1).tolist() == [True, False]
    assert (values.float() * scale).isfinite().all(1).tolist() == [True, False]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(128, 64), (67, 99)])
def test_weight(shape: tuple[int, int], transposed: bool) -> None:
    weight = torch.randn(shape).half()
    expected_values, expected_scale = quantized_weight(weight, transposed)
    values, scale = empty_values(shape, transposed, weight.device)
    kernels.quantize_weight(values.fill_(torch.nan), scale.fill_(torch.nan), weight)
    assert torch.equal(scale, expected_scale)
    assert_same(values, expected_values)


# Whole tiles, a part of a tile, blocks longer than a tile's rows, and rows of one block.
@pytest.mark.parametrize(
    ("shape", "block_size"), [((128, 128), 64), ((67, 576), 64), ((6, 96), 32), ((5, 1024), 512), ((3, 64), 64)]
)
@pytest.mark.parametrize("group_size", [0, 16])
@pytest.mark.parametrize("transposed", [False, True])
def test_nf4(shape: tuple[int, int], block_size: int, group_size: int, transposed: bool) -> None:
    stored, sizes = stored_weight(shape, block_size, group_size), {"block_size": block_size, "group_size": group_size}
    expected_values, expected_scale = dequantized_nf4(stored, shape, transposed, **sizes)
    values, scale = empty_values(shape, transposed, expected_scale.device)
    kernels.nf4_dequantize(values.fill_(torch.nan), scale.fill_(torch.nan), *stored, **sizes)
    assert torch.equal(scale, expected_scale)
    assert_same(values, expected_values)


def test_columns_of_a_larger_matrix() -> None:
    stored, sizes = stored_weight((48, 128), 64, 0), {"block_size": 64, "group_size": 0}
    expected, _ = dequantized_nf4(stored, (48, 128), False, **sizes)
    stack = torch.ones(128, 80).to(E4M3)
    kernels.nf4_dequantize(stack.t()[16:64], torch.empty(48), *stored, **sizes)
    assert_same(stack.t(), torch.cat([torch.ones(16, 128), expected.float(), torch.ones(16, 128)]).to(E4M3))


def test_empty() -> None:
    values, scale = kernels.quantize_rows(torch.empty(0, 64), None)
    assert (values.shape, scale.shape) == ((0, 64), (0, 1))
