"""Kernels of RMS norm on a card, against PyTorch."""

from __future__ import annotations

import pytest
import torch

from nybble.ops import norm as ops
from nybble.ops.fp8 import fp8_quantize_rows
from nybble.ops.norm import add_norm, norm, norm_again, norm_backward
from tests.ops.test_fp8_gpu import HAS_FP8
from tests.ops.test_norm import EPS, SCALING, Inputs, check
from tests.ops.test_norm_fp8 import Ops, check_fp8

pytestmark = pytest.mark.gpu


# Widths of models; rows that end inside a tile; an odd width; more programs than are resident at once.
RANKS = {
    576: (0, 3, 16, 64),
    3840: (0, 16),
    4096: (0, 16, 40, 64, 128),
    8192: (0, 16),
    16384: (0, 16),
    1111: (0, 3, 16),
}


@pytest.mark.parametrize(("hidden", "r"), [(hidden, r) for hidden, ranks in RANKS.items() for r in ranks])
def test_bfloat16(hidden: int, r: int) -> None:
    check(ops, Inputs.random(131, hidden, r, torch.bfloat16, "cuda", alone=r in (3, 40)))


@pytest.mark.skipif(not HAS_FP8, reason="needs compute capability 8.9")
@pytest.mark.parametrize(("hidden", "r"), [(hidden, r) for hidden, ranks in RANKS.items() for r in ranks])
def test_rows_in_fp8(hidden: int, r: int) -> None:
    check_fp8(Ops, Ops, fp8_quantize_rows, Inputs.random(131, hidden, r, torch.bfloat16, "cuda", alone=r in (3, 40)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("hidden", [96, 1111, 4096])
@pytest.mark.parametrize("r", [0, 16])
def test_other_dtypes(hidden: int, r: int, dtype: torch.dtype) -> None:
    check(ops, Inputs.random(131, hidden, r, dtype, "cuda"))


@pytest.mark.parametrize("hidden", [576, 4096])
def test_more_programs_than_run_at_once(hidden: int) -> None:
    check(ops, Inputs.random(8192, hidden, 16, torch.bfloat16, "cuda"))


def test_single_weights() -> None:
    inputs = Inputs.random(37, 4096, 16, torch.bfloat16, "cuda")
    half, single = (add_norm(*inputs.added, weight, EPS, 0.0)[1] for weight in (inputs.weight, inputs.weight.float()))
    torch.testing.assert_close(half, single, rtol=2**-7, atol=0)  # one rounding


@pytest.mark.parametrize("r", [0, 16])
@pytest.mark.parametrize("hidden", [576, 4096])
def test_same_inputs_give_the_same_bits(hidden: int, r: int) -> None:
    inputs = Inputs.random(1000, hidden, r, torch.bfloat16, "cuda")
    first, *others = (inputs.outputs(ops) for _ in range(5))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_no_tokens() -> None:
    found = Inputs.random(0, 4096, 16, torch.bfloat16, "cuda").outputs(ops)
    assert [tuple(x.shape) for x in found.values()] == [(0, 4096), (2, 0, 4096), (2, 0), (0, 4096)]


def test_more_values_than_int32_counts() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GB")
    tail = Inputs.random(100, 4096, 16, torch.bfloat16, "cuda", parts=1)
    tokens = 2**31 // 4096 + 100
    delta, narrow = (torch.zeros(tokens, columns, dtype=torch.bfloat16, device="cuda") for columns in (4096, 16))
    delta[-100:], narrow[-100:] = tail.delta, tail.narrow
    h, normed, rstd = add_norm(None, delta, narrow, tail.B, SCALING, tail.weight, EPS, 0.0)
    expected = add_norm(None, tail.delta, tail.narrow, tail.B, SCALING, tail.weight, EPS, 0.0)
    assert all(torch.equal(whole[-100:], part) for whole, part in zip((h, normed, rstd), expected, strict=True))
    assert torch.equal(norm_again(h, rstd, tail.weight, 0.0)[-100:], expected[1])
    del normed
    d = norm_backward(delta, narrow, narrow, tail.A, None, h, rstd, tail.weight, 0.0)
    part = norm_backward(tail.delta, tail.narrow, tail.narrow, tail.A, None, *expected[::2], tail.weight, 0.0)
    assert torch.equal(d[-100:], part)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("r", [0, 3])
def test_ops_are_well_formed(r: int) -> None:
    x = Inputs.random(5, 96, r, torch.bfloat16, "cuda")
    rstd = torch.ones(5, device="cuda")
    torch.library.opcheck(add_norm, (*x.added, x.weight, EPS, x.offset))
    torch.library.opcheck(norm_again, (x.delta, rstd, x.weight, x.offset))
    torch.library.opcheck(norm, (x.delta, x.weight, EPS, x.offset))
    torch.library.opcheck(norm_backward, (*x.gradients(x.delta), x.delta, rstd, x.weight, x.offset))
