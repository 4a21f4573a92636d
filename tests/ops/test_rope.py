"""Splitting, norms and rotation of heads against Transformers' own functions and autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nybble.ops.rope import split_rope, split_rope_backward
from tests.ops.rope_cases import CASES, Case, assert_exact_enough, definition, definition_backward, make_inputs


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("tokens", [7, 0])
def test_heads_are_those_of_transformers(case: Case, tokens: int) -> None:
    inputs = make_inputs(case, tokens)
    found = split_rope(*inputs.forward())
    torch.testing.assert_close(found, definition(inputs), rtol=0, atol=1e-13)
    assert all(tensor.is_contiguous() for tensor in found)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("tokens", [7, 0])
def test_gradient_is_that_of_autograd(case: Case, tokens: int) -> None:
    inputs = make_inputs(case, tokens)
    found = split_rope_backward(*inputs.backward())
    torch.testing.assert_close(found, definition_backward(inputs), rtol=0, atol=1e-13)
    assert found.is_contiguous()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_are_rounded_once(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, 7, dtype)
    found = *split_rope(*inputs.forward()), split_rope_backward(*inputs.backward())
    assert {tensor.dtype for tensor in found} == {dtype}
    assert_exact_enough(found, inputs)


def test_gradients_need_not_be_contiguous() -> None:
    """Attention returns them as (batch, heads, seq_len, head_dim)."""
    inputs = make_inputs(CASES[5], 6)
    d_q, d_k, d_v = (gradient.transpose(0, 1).contiguous().transpose(0, 1) for gradient in inputs.gradients)
    strided = replace(inputs, gradients=(d_q, d_k, d_v))
    assert not d_q.is_contiguous()
    assert torch.equal(split_rope_backward(*strided.backward()), split_rope_backward(*inputs.backward()))


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ops_are_well_formed(case: Case, dtype: torch.dtype) -> None:
    """Schema, fake tensors and tracing agree with what the ops do; no output is a view of an input."""
    inputs = make_inputs(case, 4, dtype)
    torch.library.opcheck(split_rope, inputs.forward())
    torch.library.opcheck(split_rope_backward, inputs.backward())
