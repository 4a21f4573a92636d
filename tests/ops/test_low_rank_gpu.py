"""Both gradients of low-rank pairs on a card."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nybble.ops.low_rank import a_gradient_, low_rank_backward_
from tests.ops.test_low_rank import HALF, SCALING, assert_half_is_right, both, gradient_of_a, pair_tensors, plain

pytestmark = [
    pytest.mark.gpu,
    # cuBLAS, which computes what is compared with, may differ from run to run: that does not matter here.
    pytest.mark.filterwarnings("ignore:Deterministic behavior was enabled:UserWarning"),
]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that an op allocates is full of NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(8, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


# Llama 8B's and SmolLM2's stacked linears, a single narrow one, odd widths.
@pytest.mark.parametrize("sizes", [[4096, 1024, 1024], [1536, 1536], [576, 192, 192], [1024], [67, 5]], ids=str)
@pytest.mark.parametrize("tokens", [1, 1000, 8192])
def test_shapes(sizes: list[int], tokens: int) -> None:
    compare(sizes, tokens, 16, torch.bfloat16)


@pytest.mark.parametrize("r", [3, 8, 32, 64, 80])  # 80: two products by cuBLAS
def test_ranks(r: int) -> None:
    compare([4096, 1024, 1024], 1000, r, torch.bfloat16)


@pytest.mark.parametrize("r", [16, 80])
def test_fp16(r: int) -> None:
    compare([4096, 1024, 1024], 1000, r, torch.float16)


def compare(sizes: list[int], tokens: int, r: int, dtype: torch.dtype) -> None:
    tensors = pair_tensors(tokens, r, sizes, dtype, "cuda")
    assert_half_is_right(both(low_rank_backward_, tensors, sizes), tensors, sizes)


def test_single() -> None:
    tensors = pair_tensors(100, 16, [96, 32], torch.float32, "cuda")
    exact = plain(*(tensor.double() for tensor in tensors), [96, 32])
    theirs = plain(*tensors, [96, 32])
    found = both(low_rank_backward_, tensors, [96, 32])
    for ours, torchs, right in zip(found, theirs, exact, strict=True):
        assert (ours - right).norm() <= 2 * (torchs - right).norm()


def test_same_bits_twice() -> None:
    tensors = pair_tensors(2048, 16, [14336, 14336], torch.bfloat16, "cuda")
    first, second = (both(low_rank_backward_, tensors, [14336, 14336]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tokens(dtype: torch.dtype) -> None:
    d_narrow, d_B = both(low_rank_backward_, pair_tensors(0, 3, [10, 5], dtype, "cuda"), [10, 5])
    assert d_narrow.shape == (0, 6)
    assert torch.equal(d_B, torch.zeros(15, 3, device="cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_gradient_of_a(dtype: torch.dtype) -> None:
    d_narrow, x = (torch.randn(1000, columns, device="cuda", dtype=dtype) for columns in (48, 576))
    exact = d_narrow.double().T @ x.double()
    found, theirs = gradient_of_a(d_narrow, x), d_narrow.float().T @ x.float()
    assert found.dtype == torch.float32
    # Matrix instructions cut what they add, rather than round it: some bits of fp32's 24 are lost, but not 16 bits'.
    few_bits = 2 if dtype == torch.float32 else 64
    assert (found - exact).norm() <= few_bits * (theirs - exact).norm()


def test_more_values_than_int32_counts() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GB")
    tokens, sizes, last = 75_000, [14336, 14336], 100
    d_output = torch.zeros(tokens, 28672, dtype=torch.bfloat16, device="cuda")
    narrow = torch.zeros(tokens, 32, dtype=torch.bfloat16, device="cuda")
    tail_output, tail_narrow, B = pair_tensors(last, 16, sizes, torch.bfloat16, "cuda")
    d_output[-last:], narrow[-last:] = tail_output, tail_narrow
    d_narrow, d_B = both(low_rank_backward_, [d_output, narrow, B], sizes)
    assert not d_narrow[:-last].any()
    assert_half_is_right((d_narrow[-last:], d_B), [tail_output, tail_narrow, B], sizes)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_ops_are_well_formed() -> None:
    tensors = pair_tensors(70, 3, [96, 32], torch.bfloat16, "cuda")
    d_A, d_B = torch.zeros(6, 128, device="cuda"), torch.zeros(128, 3, device="cuda")
    torch.library.opcheck(low_rank_backward_, (d_B, *tensors, SCALING, [96, 32]))
    torch.library.opcheck(a_gradient_, (d_A, tensors[1], tensors[0]))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(8192, 48, 4096), (1000, 16, 14336), (77, 6, 40)])
def test_the_gradient_of_a_is_added_to_what_is_there(dtype: torch.dtype, tokens: int, rows: int, columns: int) -> None:
    d_narrow, x = (torch.randn(tokens, width, device="cuda").to(dtype) for width in (rows, columns))
    out = torch.randn(rows, columns, device="cuda")
    product = d_narrow.double().T @ x.double()
    expected, theirs = out.double() + product, (d_narrow.T @ x).double()
    a_gradient_(out, d_narrow, x)
    assert (out.double() - expected).norm() <= (theirs - product).norm() / 8  # fp32, not rounded to 16 bits


def test_the_gradient_of_b_is_added_to_what_is_there() -> None:
    sizes = [4096, 1024, 1024]
    tensors = pair_tensors(1000, 16, sizes, torch.bfloat16, "cuda")
    before = torch.randn(sum(sizes), 16, device="cuda")
    d_B = before.clone()
    low_rank_backward_(d_B, *tensors, SCALING, sizes)
    exact = before.double() + plain(*(tensor.double() for tensor in tensors), sizes)[1]
    rounded = exact.float().double()
    assert (d_B.double() - exact).norm() <= 64 * (rounded - exact).norm()  # as in test_gradient_of_a
