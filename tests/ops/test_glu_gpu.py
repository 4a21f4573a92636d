"""The gated linear unit's kernels on a card, against PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nybble.ops import glu as ops
from nybble.ops.glu import ACTIVATIONS, glu, glu_backward_
from tests.ops.test_glu import SCALING, as_doubles, assert_within_twice, glu_tensors, in_place, plain

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


# Two models' widths; rows and columns that end inside a tile; an odd width; a single row.
@pytest.mark.parametrize("shape", [(128, 14336), (300, 1536), (37, 96), (70, 31), (1, 64)])
@pytest.mark.parametrize("r", [0, 16])
def test_shapes(shape: tuple[int, int], r: int) -> None:
    compare(shape, r, 2, "silu", torch.bfloat16)


@pytest.mark.parametrize(("r", "parts"), [(3, 2), (8, 2), (16, 1), (64, 2)])
def test_ranks(r: int, parts: int) -> None:
    compare((300, 1536), r, parts, "silu", torch.bfloat16)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("r", [0, 16])
def test_activations_and_dtypes(activation: str, dtype: torch.dtype, r: int) -> None:
    compare((70, 96), r, 2, activation, dtype)


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
