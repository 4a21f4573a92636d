"""AdamW's kernels on a card."""

from __future__ import annotations

import pytest
import torch

from nybble.ops.adamw import adamw_, adamw_8bit_
from tests.ops import adamw_cases as cases

pytestmark = pytest.mark.gpu

UPDATES = {32: adamw_, 8: adamw_8bit_}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("step", [1, 2, 900, 100_000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update(step: int, dtype: torch.dtype) -> None:
    state = cases.random_state(100_003, step=step, dtype=dtype)
    cases.assert_as_precise_as_torch(cases.updated(adamw_, state, "cuda"), state)


@pytest.mark.parametrize("blocks", [1, 4, 101])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_in_8_bits(blocks: int, dtype: torch.dtype) -> None:
    state = cases.random_state(256 * blocks, dtype=dtype, bits=8)
    found = cases.updated(adamw_8bit_, state, "cuda")
    cases.assert_as_precise_as_torch(found, state)
    cases.assert_rounded_to_nearest(found, state)


@pytest.mark.parametrize("numel", [1, 1000, 1024])
def test_nothing_beyond_the_end_is_touched(numel: int) -> None:
    state = tuple(tensor.cuda() for tensor in cases.random_state(2048))
    tensors = [tensor.clone() for tensor in state]
    adamw_(*(tensor[:numel] for tensor in tensors[:4]), *tensors[4:], **cases.OPTIONS)
    expected = cases.updated(adamw_, state, "cuda")
    for found, before, after in zip(tensors[:4], state, expected, strict=False):
        assert torch.equal(found[:numel].cpu(), after[:numel])
        assert torch.equal(found[numel:], before[numel:])


def test_codes_beside_a_border() -> None:
    state, betas = cases.beside_borders()
    found, expected = (cases.updated(adamw_8bit_, state, device, **betas) for device in ("cuda", "cpu"))
    assert all(torch.equal(a, b) for a, b in zip(found[2:6], expected[2:6], strict=True))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("scale", [torch.inf, -torch.inf, torch.nan])
def test_nothing_changes_where_the_scale_is_not_finite(bits: int, scale: float) -> None:
    state = (*cases.random_state(512, bits=bits)[:-1], torch.tensor(scale))
    found = cases.updated(UPDATES[bits], state, "cuda")
    assert all(torch.equal(a, b) for a, b in zip(found[:-1], state[:-1], strict=True))


def test_a_gradient_that_is_not_a_number_stays_in_its_block() -> None:
    """Where the scale let it pass, its code is still an index."""
    state = cases.random_state(512, bits=8)
    state[1][3] = torch.nan
    found = cases.updated(adamw_8bit_, state, "cuda")
    assert found[0].isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("bits", [32, 8])
def test_empty_and_zero(bits: int) -> None:
    cases.updated(UPDATES[bits], cases.random_state(0, bits=bits), "cuda")
    state = cases.random_state(256, bits=bits)
    zeros = tuple(torch.zeros_like(tensor) for tensor in state[:-3])
    found = cases.updated(UPDATES[bits], (*zeros, *state[-3:]), "cuda")
    assert not any(tensor.any() for tensor in cases.in_fp32(found)[:4])


def test_more_values_than_int32_counts() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GB")
    numel = 2**31 + 512
    tail = cases.random_state(512, dtype=torch.bfloat16, bits=8)
    tensors = []
    for tensor in tail[:6]:
        size = numel if tensor.numel() == 512 else numel // 256
        tensors.append(torch.zeros(size, dtype=tensor.dtype, device="cuda"))
        tensors[-1][-tensor.numel() :] = tensor
    scalars = [tensor.cuda() for tensor in tail[6:]]
    adamw_8bit_(*tensors, *scalars, **cases.OPTIONS)
    expected = cases.updated(adamw_8bit_, tail, "cuda")
    for found, part in zip(tensors, expected[:6], strict=True):
        assert torch.equal(found[-part.numel() :].cpu(), part)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_ops_are_well_formed() -> None:
    for bits, update in UPDATES.items():
        state = tuple(tensor.cuda() for tensor in cases.random_state(512, bits=bits))
        torch.library.opcheck(update, state, cases.OPTIONS)
