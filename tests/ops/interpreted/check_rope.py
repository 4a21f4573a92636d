"""Kernels that split and rotate heads, against PyTorch. bf16 is left to the GPU: the interpreter truncates to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from nybble.ops.triton import rope as kernels
from tests.ops.rope_cases import CASES, Case, assert_exact_enough, make_inputs


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that is allocated is full of NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernels(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, 37, dtype)  # a tile of tokens and a part of one
    found = *kernels.split_rope(*inputs.forward()), kernels.split_rope_backward(*inputs.backward())
    assert_exact_enough(found, inputs)


def test_gradients_need_not_be_contiguous() -> None:
    inputs = make_inputs(CASES[5], 37, torch.float16)
    d_q, d_k, d_v = (gradient.transpose(0, 1).contiguous().transpose(0, 1) for gradient in inputs.gradients)
    strided = replace(inputs, gradients=(d_q, d_k, d_v))
    found, expected = (kernels.split_rope_backward(*each.backward()) for each in (strided, inputs))
    assert torch.equal(found, expected)


def test_no_tokens() -> None:
    inputs = make_inputs(CASES[1], 0, torch.float16)
    assert [tensor.numel() for tensor in kernels.split_rope(*inputs.forward())] == [0, 0, 0]
    assert kernels.split_rope_backward(*inputs.backward()).shape == (0, 15 * 64)
