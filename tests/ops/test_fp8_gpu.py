"""fp8 kernels on a card: bit-equal to the references, which are the definition."""

from __future__ import annotations

from collections.abc import Iterator

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
from tests.ops.test_fp8 import DTYPES, dequantized_nf4, quantized_weight, stored_weight

HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_FP8, reason="needs compute capability 8.9")]


@pytest.fixture
def _poisoned_memory() -> Iterator[None]:
    """Memory that an op allocates is full of NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8, device="cuda", dtype=E4M3).float().isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal bits; on compute capability 8.9, where Triton rounds by way of fp16, neighbours in a few ties."""
    found, expected = found.cpu().contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
    if torch.cuda.get_device_capability() >= (9, 0):
        assert torch.equal(found, expected)
        return
    distance = (found.int() - expected.int()).abs()
    assert distance.max() <= 1
    assert (distance == 0).float().mean() > 0.99


# Rows in registers and rows that are read twice, whole blocks and odd numbers.
ROWS = [(5, 96), (3, 576), (7, 4096), (3, 14336), (2, 28672), (2, 57344), (3, 50257)]


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(shape: tuple[int, int], scaled: bool, dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    x[1] = 0
    column_scale = torch.rand(shape[1]) if scaled else None
    values, scale = fp8_quantize_rows(x.cuda(), column_scale.cuda() if scaled else None)
    expected_values, expected_scale = fp8_quantize_rows(x, column_scale)
    assert torch.equal(scale.cpu(), expected_scale)
    assert_same(values, expected_values)


def test_not_a_number_stays_in_its_row() -> None:
    x = torch.ones(2, 4096, device="cuda")
    x[1, 3] = torch.nan
    values, scale = fp8_quantize_rows(x, None)
    assert (values.float() * scale).isfinite().all(1).tolist() == [True, False]


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(48, 96), (512, 1024), (67, 99), (130, 4096)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight(shape: tuple[int, int], transposed: bool, dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    values, scale = quantized_weight(weight.cuda(), transposed)
    expected_values, expected_scale = quantized_weight(weight, transposed)
    assert torch.equal(scale.cpu(), expected_scale)
    assert_same(values, expected_values)


NF4 = [((512, 1024), 64), ((67, 576), 64), ((6, 96), 32), ((130, 4096), 512), ((5, 4096), 4096), ((1026, 14336), 64)]


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize(("shape", "block_size"), NF4)
@pytest.mark.parametrize("group_size", [0, 16, 256])
@pytest.mark.parametrize("transposed", [False, True])
def test_nf4(shape: tuple[int, int], block_size: int, group_size: int, transposed: bool) -> None:
    stored, sizes = stored_weight(shape, block_size, group_size), {"block_size": block_size, "group_size": group_size}
    on_card = [None if tensor is None else tensor.cuda() for tensor in stored]
    values, scale = dequantized_nf4(on_card, shape, transposed, **sizes)
    expected_values, expected_scale = dequantized_nf4(stored, shape, transposed, **sizes)
    assert torch.equal(scale.cpu(), expected_scale)
    assert_same(values, expected_values)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_part_of_a_larger_matrix(transposed: bool) -> None:
    """Rows 16 to 528 of a stack, or those columns of its transpose: the rest stays as it is."""
    stored, sizes = stored_weight((512, 1024), 64, 256), {"block_size": 64, "group_size": 256}
    weight = torch.randn(512, 1024)
    stack = torch.ones((1024, 544) if transposed else (544, 1024), device="cuda").to(E4M3)
    by_row = stack.t() if transposed else stack
    row_scale = torch.empty(512, device="cuda")
    ones = torch.ones(16, 1024).to(E4M3)
    nf4_dequantize_fp8_into(by_row[16:528], row_scale, *(tensor.cuda() for tensor in stored), **sizes)
    expected, _ = dequantized_nf4(stored, (512, 1024), False, **sizes)
    assert_same(by_row, torch.cat([ones.float(), expected.float(), ones.float()]).to(E4M3))
    fp8_quantize_weight_into(by_row[16:528], row_scale, weight.cuda())
    expected, _ = quantized_weight(weight, False)
    assert_same(by_row, torch.cat([ones.float(), expected.float(), ones.float()]).to(E4M3))


@pytest.mark.parametrize(("rows", "n", "k"), [(64, 128, 256), (33, 48, 96), (1, 4096, 4096), (512, 4096, 14336)])
def test_product(rows: int, n: int, k: int) -> None:
    a, a_scale = fp8_quantize_rows(torch.randn(rows, k, device="cuda", dtype=torch.bfloat16), None)
    b, b_scale = fp8_quantize_rows(torch.randn(n, k, device="cuda", dtype=torch.bfloat16), None)
    exact = (a.double() * a_scale) @ (b.double() * b_scale).t()
    found = fp8_matmul(a, a_scale, b, b_scale.view(1, -1))
    assert (found - exact).norm() <= 2 * (exact.bfloat16() - exact).norm()


def test_more_values_than_int32_counts() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 16 << 30:
        pytest.skip("needs 16 GB")
    columns = 28672
    tail = torch.randn(100, columns, device="cuda", dtype=torch.bfloat16)
    x = torch.zeros(2**31 // columns + 100, columns, device="cuda", dtype=torch.bfloat16)
    x[-100:] = tail
    values, scale = fp8_quantize_rows(x, None)
    expected_values, expected_scale = fp8_quantize_rows(tail, None)
    assert torch.equal(values[-100:].view(torch.uint8), expected_values.view(torch.uint8))
    assert torch.equal(scale[-100:], expected_scale)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_ops_are_well_formed() -> None:
    weight = torch.randn(16, 64, device="cuda")
    stored = [tensor.cuda() for tensor in stored_weight((16, 64), 32, 4)]
    without_schema = {"test_utils": ("test_faketensor", "test_autograd_registration")}
    values, scale = fp8_quantize_rows(weight, None)
    torch.library.opcheck(fp8_quantize_rows, (weight, torch.rand(64, device="cuda")), **without_schema)
    torch.library.opcheck(fp8_matmul, (values, scale, values, scale.view(1, -1)), **without_schema)
    into = values.clone(), scale.view(-1).clone()
    torch.library.opcheck(fp8_quantize_weight_into, (*into, weight), **without_schema)
    sizes = {"block_size": 32, "group_size": 4}
    torch.library.opcheck(nf4_dequantize_fp8_into, (*into, *stored), sizes, **without_schema)
