"""NF4 kernels on a card: bit-equal to the references, which are the definition."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nybble.ops import nf4
from nybble.ops.nf4 import absmax_quantize, nf4_dequantize, nf4_quantize
from nybble.quant.format import NF4Spec
from nybble.quant.weight import NF4Weight, dequantize_stack_
from tests.ops.borders import values_beside_borders

pytestmark = pytest.mark.gpu

SHAPES = [(512, 1024), (48, 96), (67, 31), (1, 1), (3, 5, 640)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that an op allocates is full of NaN, or 255, until it is written."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", [32, 64, 1024, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize(shape: tuple[int, ...], block_size: int, dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    weight.view(-1)[1:90] = 0
    codes, absmax = nf4_quantize(weight.cuda(), block_size)
    expected_codes, expected_absmax = nf4_quantize(weight, block_size)
    assert torch.equal(absmax.cpu(), expected_absmax)
    assert torch.equal(codes.cpu(), expected_codes)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("group_size", [0, 16, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize(shape: tuple[int, ...], block_size: int, group_size: int, dtype: torch.dtype) -> None:
    codes, absmax = nf4_quantize(torch.randn(shape), block_size)
    stored = (codes, *(absmax_quantize(absmax, group_size) if group_size else (absmax, None, None)))
    options = {"block_size": block_size, "group_size": group_size, "shape": shape, "dtype": dtype}
    on_card = [None if tensor is None else tensor.cuda() for tensor in stored]
    assert torch.equal(nf4_dequantize(*on_card, **options).cpu(), nf4_dequantize(*stored, **options))


def test_quantize_values_beside_a_border() -> None:
    weight = values_beside_borders(10_000)
    assert torch.equal(nf4_quantize(weight.cuda(), 64)[0].cpu(), nf4_quantize(weight, 64)[0])


def test_not_a_number_reaches_absmax() -> None:
    weight = torch.randn(2, 64, device="cuda")
    weight[1, 5] = float("nan")
    assert nf4_quantize(weight, 64)[1].isfinite().tolist() == [True, False]


def test_more_values_than_int32_counts() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GB")
    numel = 2**31 + 4096 + 64
    weight = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    tail = torch.randn(4096 + 64 + 640, dtype=torch.bfloat16, device="cuda")
    weight[-tail.numel() :] = tail
    codes, absmax = nf4_quantize(weight, 64)
    expected = nf4_quantize(tail, 64)
    assert torch.equal(codes[-expected[0].numel() :], expected[0])
    assert torch.equal(absmax[-expected[1].numel() :], expected[1])
    options = {"block_size": 64, "group_size": 0, "dtype": torch.bfloat16}
    whole = nf4_dequantize(codes, absmax, None, None, shape=(numel,), **options)
    part = nf4_dequantize(*expected, None, None, shape=tail.shape, **options)
    assert torch.equal(whole[-tail.numel() :], part)


def test_near_ties_against_bitsandbytes() -> None:
    """Its CUDA build computes 1 / absmax with fast math, so an ulp decides otherwise beside a border."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    torch.use_deterministic_algorithms(False)
    weight = torch.randn(4096, 4096, device="cuda")
    theirs, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes, absmax = nf4_quantize(weight, 64)
    assert torch.equal(absmax, state.absmax)
    different = ((codes ^ theirs.view(-1)) != 0).sum().item()
    unit = weight.view(-1, 64) * absmax.reciprocal()[:, None]
    borders = nf4.midpoints(nf4.levels(weight.device))
    near_ties = sum(((unit - border).abs() < 2e-7).sum().item() for border in borders)
    assert different <= near_ties
    options = {"block_size": 64, "group_size": 0, "shape": weight.shape, "dtype": torch.bfloat16}
    state.dtype = torch.bfloat16
    assert torch.equal(nf4_dequantize(theirs, state.absmax, None, None, **options), bnb.dequantize_4bit(theirs, state))


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_ops_are_well_formed() -> None:
    codes, absmax = nf4_quantize(torch.randn(5, 64, device="cuda"), 64)
    options = {"block_size": 64, "group_size": 0, "shape": (5, 64), "dtype": torch.bfloat16}
    torch.library.opcheck(nf4_quantize, (torch.randn(5, 64, device="cuda"), 64))
    torch.library.opcheck(nf4_dequantize, (codes, absmax, None, None), options)


@pytest.mark.parametrize("rows", [[4096, 1024, 1024], [576, 192, 192], [5, 3]], ids=str)
def test_a_stack_of_weights(rows: list[int]) -> None:
    weights = [NF4Weight.quantize(torch.randn(count, 576, device="cuda"), NF4Spec()) for count in rows]
    found = torch.full((sum(rows), 576), torch.nan, device="cuda", dtype=torch.bfloat16)
    dequantize_stack_(found, weights)
    assert torch.equal(found, torch.cat([weight.dequantize(torch.bfloat16) for weight in weights]))
