"""AdamW's references against PyTorch, against the paper of 8-bit moments, and against bitsandbytes."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from nybble.ops.adamw import (
    ZERO_CODE,
    adamw_,
    adamw_8bit_,
    dequantize_moment,
    first_moment_levels,
    second_moment_levels,
)
from tests.ops import adamw_cases as cases

UPDATES = {32: adamw_, 8: adamw_8bit_}


@pytest.mark.parametrize("step", [1, 2, 900, 100_000])
def test_the_update_is_pytorchs(step: int) -> None:
    state = tuple(tensor.double() for tensor in cases.random_state(1001, step=step))
    found, expected = (cases.updated(update, state) for update in (adamw_, cases.torch_adamw))
    for a, b in zip(found[:4], expected[:4], strict=True):
        assert torch.allclose(a, b, rtol=1e-13, atol=0)


@pytest.mark.parametrize("step", [1, 2, 900, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_as_precise_as_pytorchs(step: int, dtype: torch.dtype) -> None:
    state = cases.random_state(3001, step=step, dtype=dtype)
    cases.assert_as_precise_as_torch(cases.updated(adamw_, state), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_8_bit_moments_are_rounded_to_the_nearest_level_after_the_update(dtype: torch.dtype) -> None:
    state = cases.random_state(256 * 13, dtype=dtype, bits=8)
    found = cases.updated(adamw_8bit_, state)
    cases.assert_as_precise_as_torch(found, state)
    cases.assert_rounded_to_nearest(found, state)


def test_a_second_moment_that_is_not_zero_never_becomes_zero() -> None:
    """bitsandbytes rounds it to zero: the next gradient that is smaller makes m / (sqrt(v) + eps) a huge step."""
    gradient = torch.full((256,), 1e-5)
    gradient[0] = 1.0
    first, second = (torch.full((256,), code, dtype=torch.uint8) for code in (ZERO_CODE, 0))
    scalars = (torch.tensor(1e-3), torch.tensor(1.0), torch.tensor(1.0))
    state = (torch.zeros(256), gradient, first, torch.zeros(1), second, torch.zeros(1), *scalars)
    found = cases.updated(adamw_8bit_, state)
    assert dequantize_moment(found[4], found[5], second_moment_levels(cases.CPU)).min() > 0
    scalars = (torch.tensor(1e-3), torch.tensor(2.0), torch.tensor(1.0))
    again = cases.updated(adamw_8bit_, (found[0], torch.zeros(256), *found[2:6], *scalars))
    assert (again[0] - found[0]).abs().max() < 2e-3


def test_tables_equal_bitsandbytes() -> None:
    assert torch.equal(first_moment_levels(cases.CPU), bnb.create_dynamic_map(signed=True))
    assert torch.equal(second_moment_levels(cases.CPU), bnb.create_dynamic_map(signed=False))
    assert first_moment_levels(cases.CPU)[ZERO_CODE] == 0


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("scale", [torch.inf, -torch.inf, torch.nan])
def test_nothing_changes_where_the_scale_is_not_finite(bits: int, scale: float) -> None:
    state = (*cases.random_state(512, bits=bits)[:-1], torch.tensor(scale))
    found = cases.updated(UPDATES[bits], state)
    assert all(torch.equal(a, b) for a, b in zip(found[:-1], state[:-1], strict=True))


@pytest.mark.parametrize("bits", [32, 8])
def test_empty_and_zero(bits: int) -> None:
    cases.updated(UPDATES[bits], cases.random_state(0, bits=bits))
    state = cases.random_state(256, bits=bits)
    zeros = tuple(torch.zeros_like(tensor) for tensor in state[:-3])
    found = cases.updated(UPDATES[bits], (*zeros, *state[-3:]))
    assert not any(tensor.any() for tensor in cases.in_fp32(found)[:4])
    assert bits == 32 or (found[2] == ZERO_CODE).all()


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_ops_are_well_formed() -> None:
    """Schema, fake tensors and tracing agree with what the ops do."""
    for bits, update in UPDATES.items():
        torch.library.opcheck(update, cases.random_state(512, bits=bits), cases.OPTIONS)
