"""Gradients of low-rank pairs against autograd, for one and for several parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from nybble.ops.low_rank import a_gradient_, low_rank_backward_

SCALING = 0.7
SIZES = [[24], [10, 5, 5]]
HALF = [torch.float16, torch.bfloat16]


def pair_tensors(tokens: int, r: int, sizes: list[int], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """d_output, narrow and B."""
    generator = torch.Generator().manual_seed(tokens + r + sum(sizes))
    shapes = [(tokens, sum(sizes)), (tokens, len(sizes) * r), (sum(sizes), r)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(device, dtype) for shape in shapes]


def zeros_for(matrix: Tensor, rows: int) -> Tensor:
    """Where the gradient of a trained matrix (rows, columns of `matrix`) is added."""
    return matrix.new_zeros(rows, matrix.shape[1], dtype=torch.promote_types(matrix.dtype, torch.float32))


def both(way: Callable[..., Tensor], tensors: Sequence[Tensor], sizes: list[int]) -> tuple[Tensor, Tensor]:
    """d_narrow and d_B by `way`."""
    d_B = zeros_for(tensors[2], len(tensors[2]))
    return way(d_B, *tensors, SCALING, sizes), d_B


def gradient_of_a(d_narrow: Tensor, x: Tensor) -> Tensor:
    d_A = zeros_for(x, d_narrow.shape[1])
    a_gradient_(d_A, d_narrow, x)
    return d_A


def plain(d_output: Tensor, narrow: Tensor, B: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
    """d_narrow and d_B by autograd, each step in the dtype of the tensors."""
    narrow, B = narrow.clone().requires_grad_(), B.clone().requires_grad_()
    parts = zip(narrow.split(B.shape[1], 1), B.split(sizes), strict=True)
    output = torch.cat([narrow_part @ B_part.T * SCALING for narrow_part, B_part in parts], 1)
    return torch.autograd.grad(output, (narrow, B), d_output)


def assert_half_is_right(found: tuple[Tensor, ...], tensors: list[Tensor], sizes: list[int]) -> None:
    """d_narrow errs at most twice as much as PyTorch in the same dtype, both against float64; d_B, which is fp32, at
    most an eighth of what PyTorch's, which is rounded to 8 or 11 bits, does."""
    exact = plain(*(tensor.double() for tensor in tensors), sizes)
    theirs = plain(*tensors, sizes)
    assert [tensor.dtype for tensor in found] == [tensors[0].dtype, torch.float32]
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in tensors[1:]]
    ours, pytorch = ([(a.double() - b).norm().item() for a, b in zip(x, exact, strict=True)] for x in (found, theirs))
    assert ours[0] <= 2 * pytorch[0]
    assert 8 * ours[1] <= pytorch[1]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_reference_is_the_definition(sizes: list[int]) -> None:
    tensors = pair_tensors(7, 3, sizes, torch.float64)
    found = both(low_rank_backward_, tensors, sizes)
    torch.testing.assert_close(found, plain(*tensors, sizes), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_reference_sums_in_fp32(sizes: list[int], dtype: torch.dtype) -> None:
    tensors = pair_tensors(500, 3, sizes, dtype)
    assert_half_is_right(both(low_rank_backward_, tensors, sizes), tensors, sizes)


def test_parts_are_those_of_each_alone() -> None:
    d_output, narrow, B = pair_tensors(7, 3, [10, 5, 5], torch.float64)
    d_narrow, d_B = both(low_rank_backward_, [d_output, narrow, B], [10, 5, 5])
    alone = both(low_rank_backward_, [d_output[:, 10:15], narrow[:, 3:6], B[10:15]], [5])
    torch.testing.assert_close((d_narrow[:, 3:6], d_B[10:15]), alone, rtol=1e-13, atol=1e-13)


def test_gradient_of_a() -> None:
    x, A, d_narrow = (torch.randn(shape, dtype=torch.float64) for shape in ((7, 20), (6, 20), (7, 6)))
    A.requires_grad_()
    expected = torch.autograd.grad(x @ A.T, A, d_narrow)[0]
    torch.testing.assert_close(gradient_of_a(d_narrow, x), expected, rtol=1e-13, atol=1e-13)
    assert gradient_of_a(d_narrow.bfloat16(), x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tokens(dtype: torch.dtype) -> None:
    d_output, narrow, B = pair_tensors(0, 3, [10, 5], dtype)
    d_narrow, d_B = both(low_rank_backward_, [d_output, narrow, B], [10, 5])
    assert d_narrow.shape == (0, 6)
    assert torch.equal(d_B, torch.zeros(15, 3))
    assert torch.equal(gradient_of_a(d_narrow, torch.empty(0, 4, dtype=dtype)), torch.zeros(6, 4))


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("tokens", [7, 0])
def test_ops_are_well_formed(tokens: int) -> None:
    tensors = pair_tensors(tokens, 3, [10, 5], torch.bfloat16)
    torch.library.opcheck(low_rank_backward_, (torch.zeros(15, 3), *tensors, SCALING, [10, 5]))
    torch.library.opcheck(a_gradient_, (torch.zeros(6, 15), tensors[1], tensors[0]))


def test_gradients_are_added_to_what_is_there() -> None:
    d_output, narrow, B = pair_tensors(20, 3, [10, 5], torch.float64)
    d_A, d_B = torch.randn(6, 15, dtype=torch.float64), torch.randn(15, 3, dtype=torch.float64)
    expected = d_A + narrow.T @ d_output, d_B + plain(d_output, narrow, B, [10, 5])[1]
    a_gradient_(d_A, narrow, d_output)
    low_rank_backward_(d_B, d_output, narrow, B, SCALING, [10, 5])
    torch.testing.assert_close((d_A, d_B), expected, rtol=1e-13, atol=1e-13)
