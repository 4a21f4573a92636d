"""RMS norm with the sum before it, and its gradient, against plain sums."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor

from nybble.ops import norm as ops
from nybble.ops import triton
from nybble.ops.norm import add_norm, norm, norm_again, norm_backward

SCALING, EPS = 0.7, 1e-5
RANKS = [0, 3]  # 0: nothing is adapted
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Inputs:
    """What all ops of the family take; products are about as large as what they are added to."""

    residual: Tensor | None
    delta: Tensor
    narrow: Tensor | None
    B: Tensor | None
    weight: Tensor
    d_normed: Tensor
    d_narrow: Tensor | None
    A: Tensor | None
    d_h: Tensor | None
    offset: float

    @staticmethod
    def random(
        tokens: int,
        hidden: int,
        r: int,
        dtype: torch.dtype,
        device: str = "cpu",
        *,
        parts: int = 3,
        alone: bool = False,
    ) -> Inputs:
        """`alone`: no residual and no gradient from it. Rows are of different sizes, weights about 1 in all."""
        generator = torch.Generator().manual_seed(tokens + hidden + r)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=generator)

        size = 10.0 ** torch.linspace(-1, 1, tokens, dtype=torch.float64)[:, None]
        offset = 1.0 if alone else 0.0
        k = parts * r
        made = {
            "residual": None if alone else normal(tokens, hidden) * size,
            "delta": normal(tokens, hidden) * size,
            "narrow": normal(tokens, r) * size if r else None,
            "B": normal(hidden, r) / r**0.5 if r else None,
            "weight": normal(hidden) * 0.3 + 1 - offset,
            "d_normed": normal(tokens, hidden),
            "d_narrow": normal(tokens, k) if r else None,
            "A": normal(k, hidden) / k**0.5 if r else None,
            "d_h": None if alone else normal(tokens, hidden),
        }
        return Inputs(**{name: x if x is None else x.to(device, dtype) for name, x in made.items()}, offset=offset)

    def double(self) -> Inputs:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Inputs(**{name: x.double() if isinstance(x, Tensor) else x for name, x in values.items()})

    @property
    def added(self) -> tuple[Any, ...]:
        return self.residual, self.delta, self.narrow, self.B, SCALING

    def gradients(self, normed: Tensor) -> tuple[Tensor | None, ...]:
        """What `norm_backward` takes first."""
        return self.d_normed, self.d_narrow, None if self.A is None else normed @ self.A.T, self.A, self.d_h

    def outputs(self, module: Any) -> dict[str, Tensor]:
        """What the ops of `module` give."""
        h, normed, rstd = module.add_norm(*self.added, self.weight, EPS, self.offset)
        assert torch.equal(module.norm_again(h, rstd, self.weight, self.offset), normed)
        normed_alone, rstd_alone = module.norm(h, self.weight, EPS, self.offset)
        d = module.norm_backward(*self.gradients(normed), h, rstd, self.weight, self.offset)
        normed, rstd = torch.stack([normed, normed_alone]), torch.stack([rstd, rstd_alone])
        return {"h": h, "normed": normed, "rstd": rstd, "d": d}

    def plain(self, h: Tensor) -> dict[str, Tensor]:
        """The same in PyTorch's steps, the norm as Transformers has it, all of it at the given h, but for h itself."""
        wide = torch.promote_types(h.dtype, torch.float32)
        found = self.delta
        if self.narrow is not None:
            found = found + SCALING * (self.narrow @ self.B.T)
        if self.residual is not None:
            found = found + self.residual
        h = h.clone().requires_grad_()
        rstd = torch.rsqrt(h.to(wide).pow(2).mean(1, keepdim=True) + EPS)
        normed = (h.to(wide) * rstd).to(h.dtype) * (self.weight + self.offset)
        d_normed = self.d_normed
        if self.d_narrow is not None:
            d_normed = d_normed + self.d_narrow @ self.A
        (d,) = torch.autograd.grad(normed, h, d_normed)
        d = d if self.d_h is None else d + self.d_h
        normed, rstd = (torch.stack([x, x]) for x in (normed.detach(), rstd.detach()[:, 0]))
        return {"h": found, "normed": normed, "rstd": rstd, "d": d}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that an op allocates is full of NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check(module: Any, inputs: Inputs) -> None:
    """The ops of a module err at most twice as much as PyTorch in the same dtype, both against float64."""
    with poisoned_memory():
        found = inputs.outputs(module)
    dtype, wide = inputs.delta.dtype, torch.promote_types(inputs.delta.dtype, torch.float32)
    assert {name: x.dtype for name, x in found.items()} == {"h": dtype, "normed": dtype, "rstd": wide, "d": dtype}
    theirs, exact = inputs.plain(found["h"]), inputs.double().plain(found["h"].double())
    # Sixteen fp32 roundings, one after the other: a sum is a tree, and PyTorch's rsqrt may happen to be exact.
    torch.testing.assert_close(found.pop("rstd").double(), exact["rstd"], rtol=2**-20, atol=0)
    for name, ours in found.items():
        mine, other = ((x.double() - exact[name]).norm().item() for x in (ours, theirs[name]))
        assert mine <= 2 * other, (name, mine, other)


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("alone", [False, True])
def test_reference_is_the_definition(r: int, alone: bool) -> None:
    """In float64, with the gradient by autograd."""
    inputs = Inputs.random(5, 6, r, torch.float64, alone=alone)
    found = inputs.outputs(ops)
    torch.testing.assert_close(found, inputs.plain(found["h"]), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_rounds_no_more_than_pytorch(r: int, alone: bool, dtype: torch.dtype) -> None:
    check(ops, Inputs.random(64, 96, r, dtype, alone=alone))


def test_half_weights_and_single_weights_give_the_same() -> None:
    inputs = Inputs.random(5, 6, 3, torch.bfloat16)
    half, single = (norm(inputs.delta, weight, EPS, 0.0) for weight in (inputs.weight, inputs.weight.float()))
    assert all(map(torch.equal, half, single))


def test_a_row_of_zeros_stays_one() -> None:
    h = torch.zeros(1, 6)
    normed, rstd = norm(h, torch.ones(6), EPS, 0.0)
    assert normed.eq(0).all()
    torch.testing.assert_close(rstd, torch.tensor([EPS**-0.5]))
    assert norm_backward(h, None, None, None, None, h, rstd, torch.ones(6), 0.0).eq(0).all()


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("tokens", [5, 0])
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("alone", [False, True])
def test_ops_are_well_formed(tokens: int, r: int, alone: bool) -> None:
    """Schema, fake tensors and tracing agree with what the ops do."""
    x = Inputs.random(tokens, 6, r, torch.bfloat16, alone=alone)
    rstd = torch.ones(tokens)
    torch.library.opcheck(add_norm, (*x.added, x.weight, EPS, x.offset))
    torch.library.opcheck(norm_again, (x.delta, rstd, x.weight, x.offset))
    torch.library.opcheck(norm, (x.delta, x.weight, EPS, x.offset))
    torch.library.opcheck(norm_backward, (*x.gradients(x.delta), x.delta, rstd, x.weight, x.offset))


@pytest.mark.skipif(not triton.available(), reason="Triton is not installed here")
@pytest.mark.parametrize("bytes_per_value", [2, 4])
def test_any_width_and_rank_has_a_plan(bytes_per_value: int) -> None:
    from nybble.ops.triton.launch import CARDS, WARP_SIZE
    from nybble.ops.triton.norm import plan

    for card, hidden, r in itertools.product(CARDS, (1, 96, 576, 1111, 4096, 16384), (0, 1, 16, 48, 384, 1536)):
        made = plan(card, hidden, r, bytes_per_value)
        constants = made.constants
        values = constants["BLOCK_T"] * constants["BLOCK_C"]
        assert values <= 32 * made.num_warps * WARP_SIZE, "more would not stay in registers"
        assert 1 <= constants["NUM_STAGES"] <= 4
        assert r == 0 or min(constants["BLOCK_R"], constants["BLOCK_C"]) >= 16, "what tl.dot takes"
