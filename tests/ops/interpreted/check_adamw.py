"""AdamW kernels against their references. bf16 is left to the GPU: the interpreter truncates casts to it."""

from __future__ import annotations

import pytest
import torch

from nybble.ops.adamw import adamw_, adamw_8bit_
from nybble.ops.triton import adamw as kernels
from tests.ops import adamw_cases as cases

# NumPy, which the interpreter computes with, warns of 1 / 0 and 0 * inf in blocks of zeros and in memory not loaded.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.mark.parametrize("step", [1, 2, 900, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_update(step: int, dtype: torch.dtype) -> None:
    state = cases.random_state(3001, step=step, dtype=dtype)
    cases.assert_as_precise_as_torch(cases.updated(kernels.adamw_, state), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_update_in_8_bits(dtype: torch.dtype) -> None:
    state = cases.random_state(256 * 13, dtype=dtype, bits=8)
    found = cases.updated(kernels.adamw_8bit_, state)
    cases.assert_as_precise_as_torch(found, state)
    cases.assert_rounded_to_nearest(found, state)


@pytest.mark.parametrize("numel", [1, 1000, 1024])
def test_nothing_beyond_the_end_is_touched(numel: int) -> None:
    state = cases.random_state(2048)
    tensors = [tensor.clone() for tensor in state]
    kernels.adamw_(*(tensor[:numel] for tensor in tensors[:4]), *tensors[4:], **cases.OPTIONS)
    expected = cases.updated(kernels.adamw_, state)
    for found, before, after in zip(tensors[:4], state, expected, strict=False):
        assert torch.equal(found[:numel], after[:numel])
        assert torch.equal(found[numel:], before[numel:])


def test_codes_beside_a_border() -> None:
    state, betas = cases.beside_borders()
    found, expected = (cases.updated(update, state, **betas) for update in (kernels.adamw_8bit_, adamw_8bit_))
    assert all(torch.equal(a, b) for a, b in zip(found[2:6], expected[2:6], strict=True))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("scale", [torch.inf, -torch.inf, torch.nan])
def test_nothing_changes_where_the_scale_is_not_finite(bits: int, scale: float) -> None:
    state = (*cases.random_state(512, bits=bits)[:-1], torch.tensor(scale))
    found = cases.updated(kernels.adamw_ if bits == 32 else kernels.adamw_8bit_, state)
    assert all(torch.equal(a, b) for a, b in zip(found[:-1], state[:-1], strict=True))


def test_a_beta_of_zero() -> None:
    state = cases.random_state(256)
    found, expected = (cases.updated(update, state, beta1=0.0) for update in (kernels.adamw_, adamw_))
    torch.testing.assert_close(found[:4], expected[:4], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [32, 8])
def test_empty_and_zero(bits: int) -> None:
    update = kernels.adamw_ if bits == 32 else kernels.adamw_8bit_
    cases.updated(update, cases.random_state(0, bits=bits))
    state = cases.random_state(256, bits=bits)
    zeros = tuple(torch.zeros_like(tensor) for tensor in state[:-3])
    found = cases.updated(update, (*zeros, *state[-3:]))
    assert not any(tensor.any() for tensor in cases.in_fp32(found)[:4])
