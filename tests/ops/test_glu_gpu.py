"""The gated linear unit's kernels on a card, against PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nybble.ops import glu as ops
from nybble.ops.glu import ACTIVATIONS, glu, glu_backward_
from tests.ops.test_glu import SCALING, as_doubles, assert_within_twice, glu_tensors, in_place, plain

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that an op allocates is full of NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# Two models' widths; rows and columns that end inside a tile; an odd width.
@pytest.mark.parametrize("shape", [(128, 14336), (300, 1536), (37, 96), (70, 31)])
@pytest.mark.parametrize(("r", "parts"), [(0, 2), (3, 2), (8, 2), (16, 1), (64, 2)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half(shape: tuple[int, int], r: int, parts: int, activation: str, dtype: torch.dtype) -> None:
    compare(shape, r, parts, activation, dtype)


@pytest.mark.parametrize("shape", [(37, 96), (70, 31)])
@pytest.mark.parametrize(("r", "parts"), [(0, 2), (16, 2)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_single(shape: tuple[int, int], r: int, parts: int, activation: str) -> None:
    compare(shape, r, parts, activation, torch.float32)


def compare(shape: tuple[int, int], r: int, parts: int, activation: str, dtype: torch.dtype) -> None:
    tensors = glu_tensors(*shape, r, parts, dtype, "cuda")
    exact = plain(as_doubles(tensors), activation)
    found = in_place(ops, tensors, parts, activation)
    assert_within_twice(found, plain(tensors, activation), exact)


def test_no_tokens() -> None:
    tensors = glu_tensors(0, 64, 4, 2, torch.bfloat16, "cuda")
    assert [tuple(tensor.shape) for tensor in in_place(ops, tensors, 2, "silu")] == [(0, 64), (0, 128), (0, 64)]


def test_more_values_than_int32_counts() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GB")
    tokens, intermediate, last = 75_000, 14336, 100
    d_act = torch.zeros(tokens, intermediate, dtype=torch.bfloat16, device="cuda")
    gate_up = torch.zeros(tokens, 2 * intermediate, dtype=torch.bfloat16, device="cuda")
    tail = glu_tensors(last, intermediate, 0, 2, torch.bfloat16, "cuda")
    d_act[-last:], gate_up[-last:] = tail[0], tail[3]
    expected = in_place(ops, tail, 2, "silu")
    assert torch.equal(glu(gate_up, None, None, SCALING, 2, "silu")[-last:], expected[0])
    glu_backward_(d_act, None, None, gate_up, None, None, SCALING, 2, "silu")
    assert torch.equal(gate_up[-last:], expected[1])
    assert torch.equal(d_act[-last:], expected[2])


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_ops_are_well_formed() -> None:
    tensors = glu_tensors(37, 96, 3, 2, torch.bfloat16, "cuda")
    torch.library.opcheck(glu, (*tensors[3:], SCALING, 2, "silu"))
    torch.library.opcheck(glu_backward_, (*tensors, SCALING, 2, "silu"))
