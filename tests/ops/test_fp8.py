"""The fp8 references against their definition, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from nybble.ops.fp8 import (
    E4M3,
    fp8_matmul,
    fp8_quantize_rows,
    fp8_quantize_weight_into,
    nf4_dequantize_fp8_into,
)
from nybble.ops.nf4 import absmax_dequantize, absmax_quantize, nf4_dequantize, nf4_quantize

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_nearest(values: Tensor, units: Tensor) -> None:
    """Each value is the e4m3 number nearest to its unit; fp32 products may decide ties otherwise than float64."""
    table = torch.arange(256, dtype=torch.uint8).view(E4M3).double()
    table = table[table.isfinite()].sort().values
    flat = units.double().reshape(-1)
    above = torch.searchsorted(table, flat.clamp(-448, 448))
    distance = torch.minimum((table[above] - flat).abs(), (table[(above - 1).clamp(min=0)] - flat).abs())
    assert ((values.double().reshape(-1) - flat).abs() <= distance + 1e-6 * flat.abs()).all()


def stored_weight(shape: tuple[int, int], block_size: int, group_size: int) -> tuple[Tensor | None, ...]:
    """An NF4 weight with a row of zeros, without a second level if group_size is 0."""
    weight = torch.randn(shape) * torch.rand(shape[0], 1)
    weight[1] = 0
    codes, absmax = nf4_quantize(weight, block_size)
    return codes, *(absmax_quantize(absmax, group_size) if group_size else (absmax, None, None))


def empty_values(shape: tuple[int, int], transposed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Values (out, in), contiguous, or the transpose of what is, and row_scale, to be written."""
    values = torch.empty(shape[::-1] if transposed else shape, dtype=E4M3, device=device)
    return values.t() if transposed else values, torch.empty(shape[0], device=device)


def quantized_weight(weight: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    written = empty_values(weight.shape, transposed, weight.device)
    fp8_quantize_weight_into(*written, weight)
    return written


def dequantized_nf4(
    stored: Sequence[Tensor | None], shape: tuple[int, int], transposed: bool, **sizes: int
) -> tuple[Tensor, Tensor]:
    written = empty_values(shape, transposed, stored[0].device)
    nf4_dequantize_fp8_into(*written, *stored, **sizes)
    return written


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_take_the_nearest_values(dtype: torch.dtype, scaled: bool) -> None:
    x = (torch.randn(7, 576) * 10.0 ** torch.arange(-3, 4)[:, None]).to(dtype)
    column_scale = torch.rand(576) if scaled else None
    values, scale = fp8_quantize_rows(x, column_scale)
    exact = x.double() * (column_scale.double() if scaled else 1)
    assert values.dtype == E4M3
    assert values.float().abs().amax(1).tolist() == [448.0] * 7
    torch.testing.assert_close(scale.double(), exact.abs().amax(1, keepdim=True) / 448)
    assert_nearest(values, exact / scale)


def test_rows_of_zeros_and_of_tiny_values() -> None:
    x = torch.zeros(3, 8)
    x[1], x[2] = 1e-36, 1e-30
    values, scale = fp8_quantize_rows(x, None)
    assert scale[:2].tolist() == [[1], [1]]
    assert values.float().tolist() == [[0] * 8, [0] * 8, [448] * 8]


def test_not_a_number_stays_in_its_row() -> None:
    x = torch.ones(2, 8)
    x[1, 3] = torch.nan
    values, scale = fp8_quantize_rows(x, None)
    assert (values.float() * scale).isfinite().all(1).tolist() == [True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_has_two_layouts(dtype: torch.dtype) -> None:
    weight = torch.randn(48, 96).to(dtype)
    values, row_scale = quantized_weight(weight, False)
    rows, scale = fp8_quantize_rows(weight, None)
    assert torch.equal(values.float(), rows.float())
    assert torch.equal(row_scale, scale.view(-1))
    transposed, same_scale = quantized_weight(weight, True)
    assert torch.equal(transposed.float(), values.float())
    assert torch.equal(same_scale, row_scale)


@pytest.mark.parametrize("group_size", [0, 4])
@pytest.mark.parametrize(("shape", "block_size"), [((6, 576), 64), ((33, 96), 32), ((4, 512), 256)])
def test_nf4_takes_the_nearest_values(shape: tuple[int, int], block_size: int, group_size: int) -> None:
    stored, sizes = stored_weight(shape, block_size, group_size), {"block_size": block_size, "group_size": group_size}
    values, row_scale = dequantized_nf4(stored, shape, False, **sizes)
    absmax = absmax_dequantize(*stored[1:], group_size) if group_size else stored[1]
    peak = absmax.view(shape[0], -1).abs().amax(1)
    torch.testing.assert_close(row_scale, torch.where(peak > 0, peak / 448, 1))
    weight = nf4_dequantize(*stored, **sizes, shape=shape, dtype=torch.float32)
    assert_nearest(values, weight.double() / row_scale.double()[:, None])
    transposed, same_scale = dequantized_nf4(stored, shape, True, **sizes)
    assert torch.equal(transposed.float(), values.float())
    assert torch.equal(same_scale, row_scale)


def test_nf4_wants_whole_blocks() -> None:
    stored = stored_weight((64, 96), 64, 0)
    with pytest.raises(ValueError, match="whole blocks of 64 values"):
        dequantized_nf4(stored, (64, 96), False, block_size=64, group_size=0)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_part_of_a_larger_matrix(transposed: bool) -> None:
    """Rows 16 to 64 of a stack, or those columns of its transpose: the rest stays as it is."""
    weight, stored, sizes = torch.randn(48, 128), stored_weight((48, 128), 64, 0), {"block_size": 64, "group_size": 0}
    stack = torch.ones((128, 80) if transposed else (80, 128)).to(E4M3)
    by_row, scales, ones = stack.t() if transposed else stack, torch.ones(80), torch.ones(16, 128)

    fp8_quantize_weight_into(by_row[16:64], scales[16:64], weight)
    expected, expected_scale = quantized_weight(weight, False)
    assert torch.equal(by_row.float(), torch.cat([ones, expected.float(), ones]))
    assert torch.equal(scales, torch.cat([ones[:, 0], expected_scale, ones[:, 0]]))

    nf4_dequantize_fp8_into(by_row[16:64], scales[16:64], *stored, **sizes)
    expected, expected_scale = dequantized_nf4(stored, (48, 128), False, **sizes)
    assert torch.equal(by_row.float(), torch.cat([ones, expected.float(), ones]))
    assert torch.equal(scales, torch.cat([ones[:, 0], expected_scale, ones[:, 0]]))


def test_product_rounds_once() -> None:
    a, a_scale = fp8_quantize_rows(torch.randn(33, 96), None)
    b, b_scale = fp8_quantize_rows(torch.randn(48, 96), None)
    exact = (a.double() * a_scale) @ (b.double() * b_scale).t()
    found = fp8_matmul(a, a_scale, b, b_scale.view(1, -1))
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() <= 2 * (exact.bfloat16() - exact).norm()


def test_scales_of_a_weight_go_into_the_gradient() -> None:
    """dy W from the transposed weight. e4m3 errs by 2**-4 of a value at most, or by 2**-10 units beneath its range."""
    d_output, weight = torch.randn(33, 48), torch.randn(48, 96) * torch.logspace(-3, 1, 48)[:, None]
    quantized, row_scale = quantized_weight(weight, True)
    values, scale = fp8_quantize_rows(d_output, row_scale)
    found = fp8_matmul(values, scale, quantized.t(), torch.ones(1, 96))
    error = 2**-4 * weight.abs() + 2**-10 * row_scale[:, None]
    scaled_error = 2**-4 * d_output.abs() + 2**-10 * scale / row_scale
    bound = d_output.abs() @ error + scaled_error @ (weight.abs() + error)
    assert ((found - d_output @ weight).abs() <= bound + 2**-8 * found.abs()).all()


def test_no_rows() -> None:
    values, scale = fp8_quantize_rows(torch.empty(0, 32), None)
    assert (values.shape, scale.shape) == ((0, 32), (0, 1))
    assert fp8_matmul(values, scale, torch.zeros(16, 32).to(E4M3), torch.ones(1, 16)).shape == (0, 16)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("group_size", [0, 4])
def test_ops_are_well_formed(group_size: int) -> None:
    weight = torch.randn(16, 64)
    stored = stored_weight((16, 64), 32, group_size)
    torch.library.opcheck(fp8_quantize_rows, (weight, torch.rand(64)))
    # The check of the schema compares what an op was given before and after, which PyTorch cannot do in e4m3.
    without_schema = {"test_utils": ("test_faketensor", "test_autograd_registration")}
    values, scale = fp8_quantize_rows(weight, None)
    torch.library.opcheck(fp8_matmul, (values, scale, values, scale.view(1, -1)), **without_schema)
    into = values.clone(), scale.view(-1).clone()
    torch.library.opcheck(fp8_quantize_weight_into, (*into, weight), **without_schema)
    sizes = {"block_size": 32, "group_size": group_size}
    torch.library.opcheck(nf4_dequantize_fp8_into, (*into, *stored), sizes, **without_schema)
