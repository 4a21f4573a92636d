"""Kernels that split, normalize and rotate heads on a card, against PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from nybble.ops.rope import split_rope, split_rope_backward
from tests.ops.rope_cases import CASES, Case, assert_exact_enough, make_inputs

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that an op allocates is full of NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


# Llama 8B and Qwen3 8B; the others are small.
LARGE = [Case(32, 8, 128, 128, rank=64, parts=3), Case(32, 8, 128, 128, rank=16, parts=3, offset=0.0)]


@pytest.mark.parametrize("tokens", [20, 200])
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels(tokens: int, case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, tokens, dtype)
    on_card = inputs.to("cuda")
    assert_exact_enough((*split_rope(*on_card.forward()), split_rope_backward(*on_card.backward())), inputs)


def test_angles_may_be_more_precise_than_heads() -> None:
    inputs = make_inputs(CASES[1], 50, torch.bfloat16)
    inputs = replace(inputs, cos=inputs.cos.float().acos().cos(), sin=inputs.sin.float().asin().sin())
    found, expected = split_rope(*inputs.to("cuda").forward()), split_rope(*inputs.forward())
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.cpu(), right, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-5)


@pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=str)
def test_gradients_need_not_be_contiguous(case: Case) -> None:
    inputs = make_inputs(case, 70, torch.bfloat16).to("cuda")
    d_q, d_k, d_v = (gradient.transpose(0, 1).contiguous().transpose(0, 1) for gradient in inputs.gradients)
    strided = replace(inputs, gradients=(d_q, d_k, d_v))
    assert torch.equal(split_rope_backward(*strided.backward()), split_rope_backward(*inputs.backward()))


def test_no_tokens() -> None:
    inputs = make_inputs(CASES[1], 0, torch.bfloat16).to("cuda")
    assert [tensor.numel() for tensor in split_rope(*inputs.forward())] == [0, 0, 0]
    assert split_rope_backward(*inputs.backward()).shape == (0, 15 * 64)


def test_more_values_than_int32_counts() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GB")
    case, last = Case(32, 8, 128, 128), 100
    tokens = 2**31 // sum(case.sizes) + last
    tail = make_inputs(case, last, torch.bfloat16).to("cuda")
    qkv = torch.zeros(tokens, sum(case.sizes), dtype=torch.bfloat16, device="cuda")
    cos, sin = torch.zeros(2, tokens, 128, dtype=torch.bfloat16, device="cuda")
    qkv[-last:], cos[-last:], sin[-last:] = tail.qkv, tail.cos, tail.sin
    whole = split_rope(*replace(tail, qkv=qkv, cos=cos, sin=sin).forward())
    del qkv
    for found, expected in zip(whole, split_rope(*tail.forward()), strict=True):
        assert torch.equal(found[-last:], expected)
    gradient = split_rope_backward(*whole, cos, sin)
    tails = (heads[-last:] for heads in whole)
    assert torch.equal(gradient[-last:], split_rope_backward(*tails, tail.cos, tail.sin))


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=str)
def test_ops_are_well_formed(case: Case) -> None:
    inputs = make_inputs(case, 4, torch.bfloat16).to("cuda")
    torch.library.opcheck(split_rope, inputs.forward())
    torch.library.opcheck(split_rope_backward, inputs.backward())
