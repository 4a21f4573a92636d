"""RMS norm with its rows in e4m3: the same norm, and the bytes of a quantization of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nybble.ops.fp8 import E4M3, fp8_quantize_rows
from nybble.ops.norm import add_norm, norm, norm_again
from nybble.ops.norm_fp8 import add_norm_fp8, norm_again_fp8, norm_fp8
from tests.ops.test_norm import EPS, RANKS, Inputs, poisoned_memory


def check_fp8(module: Any, plain: Any, quantize_rows: Any, inputs: Inputs) -> None:
    """What the ops of `module` give is what those of `plain` and `quantize_rows` give one after another, to the bit."""
    inputs.delta[-1] = 0  # together with a residual of zeros, a row whose scale is 1
    if inputs.residual is not None:
        inputs.residual[-1] = 0
    if inputs.narrow is not None:
        inputs.narrow[-1] = 0
    summed, alone = (*inputs.added, inputs.weight, EPS, inputs.offset), (inputs.weight, EPS, inputs.offset)
    with poisoned_memory():
        h, normed, rstd = plain.add_norm(*summed)
        normed_alone, rstd_alone = plain.norm(h, *alone)
        rows, rows_alone = quantize_rows(normed, None), quantize_rows(normed_alone, None)
        pairs: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = [
            (module.add_norm_fp8(*summed), (h, normed, rstd, *rows)),
            (module.norm_fp8(h, *alone), (normed_alone, rstd_alone, *rows_alone)),
            (module.norm_again_fp8(h, rstd, inputs.weight, inputs.offset), (normed, *rows)),
        ]
    for found, expected in pairs:
        assert [x.dtype for x in found] == [x.dtype for x in expected]
        assert [x.shape for x in found] == [x.shape for x in expected]
        assert all(torch.equal(bits(one), bits(other)) for one, other in zip(found, expected, strict=True))


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == E4M3 else x


class Ops:
    """The ops by their names."""

    add_norm, norm, norm_again = staticmethod(add_norm), staticmethod(norm), staticmethod(norm_again)
    add_norm_fp8, norm_fp8 = staticmethod(add_norm_fp8), staticmethod(norm_fp8)
    norm_again_fp8 = staticmethod(norm_again_fp8)


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("alone", [False, True])
def test_reference_is_the_definition(r: int, alone: bool) -> None:
    check_fp8(Ops, Ops, fp8_quantize_rows, Inputs.random(9, 96, r, torch.bfloat16, alone=alone))


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("tokens", [5, 0])
@pytest.mark.parametrize("r", RANKS)
def test_ops_are_well_formed(tokens: int, r: int) -> None:
    x = Inputs.random(tokens, 6, r, torch.bfloat16)
    rstd = torch.ones(tokens)
    # Without AOT dispatch: it compares outputs, and PyTorch cannot compare e4m3.
    tests = {"test_utils": ("test_schema", "test_faketensor", "test_autograd_registration")}
    torch.library.opcheck(norm_again_fp8, (x.delta, rstd, x.weight, x.offset), **tests)
    torch.library.opcheck(norm_fp8, (x.delta, x.weight, EPS, x.offset), **tests)
    torch.library.opcheck(add_norm_fp8, (*x.added, x.weight, EPS, x.offset), **tests)
