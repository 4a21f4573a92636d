"""Gradients of low-rank pairs against autograd, for one and for several parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble.ops.low_rank import a_gradient, a_gradient_, low_rank_backward

SCALING = 0.7
SIZES = [[24], [10, 5, 5]]
HALF = [torch.float16, torch.bfloat16]


def pair_tensors(tokens: int, r: int, sizes: list[int], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """d_output, narrow and B."""
    generator = torch.Generator().manual_seed(tokens + r + sum(sizes))
    shapes = [(tokens, sum(sizes)), (tokens, len(sizes) * r), (sum(sizes), r)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(device, dtype) for shape in shapes]


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
    found = low_rank_backward(*tensors, SCALING, sizes)
    torch.testing.assert_close(found, plain(*tensors, sizes), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_reference_sums_in_fp32(sizes: list[int], dtype: torch.dtype) -> None:
    tensors = pair_tensors(500, 3, sizes, dtype)
    assert_half_is_right(low_rank_backward(*tensors, SCALING, sizes), tensors, sizes)


def test_parts_are_those_of_each_alone() -> None:
    d_output, narrow, B = pair_tensors(7, 3, [10, 5, 5], torch.float64)
    d_narrow, d_B = low_rank_backward(d_output, narrow, B, SCALING, [10, 5, 5])
    alone = low_rank_backward(d_output[:, 10:15], narrow[:, 3:6], B[10:15], SCALING, [5])
    torch.testing.assert_close((d_narrow[:, 3:6], d_B[10:15]), alone, rtol=1e-13, atol=1e-13)


def test_gradient_of_a() -> None:
    x, A, d_narrow = (torch.randn(shape, dtype=torch.float64) for shape in ((7, 20), (6, 20), (7, 6)))
    A.requires_grad_()
    expected = torch.autograd.grad(x @ A.T, A, d_narrow)[0]
    torch.testing.assert_close(a_gradient(d_narrow, x), expected, rtol=1e-13, atol=1e-13)
    assert a_gradient(d_narrow.bfloat16(), x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tokens(dtype: torch.dtype) -> None:
    d_output, narrow, B = pair_tensors(0, 3, [10, 5], dtype)
    d_narrow, d_B = low_rank_backward(d_output, narrow, B, SCALING, [10, 5])
    assert d_narrow.shape == (0, 6)
    assert torch.equal(d_B, torch.zeros(15, 3))
    assert torch.equal(a_gradient(d_narrow, torch.empty(0, 4, dtype=dtype)), torch.zeros(6, 4))


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("tokens", [7, 0])
def test_ops_are_well_formed(tokens: int) -> None:
    tensors = pair_tensors(tokens, 3, [10, 5], torch.bfloat16)
    torch.library.opcheck(low_rank_backward, (*tensors, SCALING, [10, 5]))
    torch.library.opcheck(a_gradient, (tensors[1], tensors[0]))


def test_the_gradient_of_a_is_added_to_what_is_there() -> None:
    d_narrow, x, out = torch.randn(20, 6), torch.randn(20, 10), torch.randn(6, 10)
    expected = out.double() + d_narrow.double().T @ x.double()
    a_gradient_(out, d_narrow, x)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.library.opcheck(a_gradient_, (out, d_narrow, x))
