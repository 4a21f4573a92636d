"""The gated linear unit's kernels against PyTorch. bf16 is left to the GPU: the interpreter truncates casts to it."""

from __future__ import annotations

import pytest
import torch

from nybble.ops.glu import ACTIVATIONS
from nybble.ops.triton import glu as kernels
from tests.ops.test_glu import as_doubles, assert_within_twice, glu_tensors, in_place, plain

# exp(-x) is infinite for a large negative gate, and its sigmoid 0, as it should be.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


# Whole tiles; rows and columns that end inside a tile; an odd width.
@pytest.mark.parametrize("shape", [(64, 128), (37, 96), (70, 31)])
@pytest.mark.parametrize(("r", "parts"), [(0, 2), (3, 2), (16, 1), (24, 2)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernels(shape: tuple[int, int], r: int, parts: int, activation: str, dtype: torch.dtype) -> None:
    tensors = glu_tensors(*shape, r, parts, dtype)
    exact = plain(as_doubles(tensors), activation)
    found = in_place(kernels, tensors, parts, activation)
    assert_within_twice(found, plain(tensors, activation), exact)


@pytest.mark.parametrize("absent", [(1, 2), (4, 5)], ids=["of the linear that follows", "of gate and up"])
def test_one_of_two_pairs_is_absent(absent: tuple[int, int]) -> None:
    tensors = glu_tensors(37, 96, 3, 2, torch.float32)
    without = [None if place in absent else tensor for place, tensor in enumerate(tensors)]
    zero = [tensor * 0 if place in absent else tensor for place, tensor in enumerate(tensors)]
    found, expected = (in_place(kernels, each, 2, "silu") for each in (without, zero))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_no_tokens() -> None:
    tensors = glu_tensors(0, 64, 4, 2, torch.float32)
    assert [tuple(tensor.shape) for tensor in in_place(kernels, tensors, 2, "silu")] == [(0, 64), (0, 128), (0, 64)]


def test_a_large_negative_gate_gives_zero() -> None:
    tensors = glu_tensors(1, 64, 0, 2, torch.float32)
    tensors[3][:, :64] = -200.0
    assert all((tensor[:, :64] == 0).all() for tensor in in_place(kernels, tensors, 2, "silu"))
