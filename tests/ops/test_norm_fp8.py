"""RMS norm with its rows in e4m3: the same norm, and the bytes of a quantization of its own."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nybble.ops import triton
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


@pytest.mark.skipif(not triton.available(), reason="Triton is not installed here")
@pytest.mark.parametrize("case", ["4096 0 bf16", "4096 16 bf16", "576 16 bf16"])
def test_rows_in_e4m3_do_not_change_how_the_norm_is_summed(case: str) -> None:
    """On a card the order of a sum follows from where its values lie, which is chosen by what is loaded and stored."""
    from nybble.ops.triton.launch import CARDS
    from nybble.ops.triton.norm import compile_cases

    compile_case = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "compile_kernels.py"))["compile_case"]
    (card,) = (card for card in CARDS if card.capability == (9, 0))
    cases = {found.name: found for found in compile_cases(card)}
    plain, fp8 = (compile_case(cases[f"{name} {case}"], card).asm["ttgir"] for name in ("add_norm", "add_norm_fp8"))
    assert summed_layout(plain) == summed_layout(fp8)


def summed_layout(ttgir: str) -> str:
    """The layout of what a kernel in Triton's GPU dialect sums."""
    aliases = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    reductions = re.findall(r'"tt\.reduce"(.*?)\}\) : \(tensor<[^,>]*, (#\w+)>\)', ttgir, re.DOTALL)
    (layout,) = (aliases[name] for body, name in reductions if "arith.addf" in body)
    return layout
