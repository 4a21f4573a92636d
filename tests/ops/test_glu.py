"""The gated linear unit against plain sums, in both directions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from nybble.ops import glu as ops
from nybble.ops.glu import ACTIVATIONS, glu, glu_backward_

SCALING = 0.7
PAIRS = [(0, 2), (3, 2), (3, 1)]  # rank and parts; rank 0: nothing is adapted


def glu_tensors(
    tokens: int, intermediate: int, r: int, parts: int, dtype: torch.dtype, device: str = "cpu"
) -> list[Tensor | None]:
    """What `glu_backward_` takes, in its order; the last three are what `glu` takes. Products are about as large as
    what they are added to."""
    generator = torch.Generator().manual_seed(tokens + intermediate + r)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(device, dtype)

    d_act, gate_up = normal(tokens, intermediate), normal(tokens, 2 * intermediate)
    if not r:
        return [d_act, None, None, gate_up, None, None]
    d_narrow, A = normal(tokens, r), normal(r, intermediate) / r**0.5
    return [d_act, d_narrow, A, gate_up, normal(tokens, parts * r), normal(2 * intermediate, r) / r**0.5]


def in_place(module: object, tensors: list[Tensor | None], parts: int, activation: str) -> list[Tensor]:
    """What `glu` and `glu_backward_` of a module give: act, the gradient of gate_up, and act again."""
    d_act, d_narrow, A, *inputs = (tensor if tensor is None else tensor.clone() for tensor in tensors)
    act = module.glu(*inputs, SCALING, parts, activation)
    module.glu_backward_(d_act, d_narrow, A, *inputs, SCALING, parts, activation)
    return [act, inputs[0], d_act]


def plain(tensors: list[Tensor | None], activation: str) -> list[Tensor]:
    """The same by autograd, each step in the dtype of the tensors."""
    d_act, d_narrow, A, gate_up, narrow, B = tensors
    gate_up = gate_up.clone().requires_grad_()
    gate, up = gate_up.chunk(2, 1)
    if narrow is not None:
        d_act = d_act + d_narrow @ A
        r, (B_gate, B_up) = B.shape[1], B.chunk(2)
        gate, up = gate + SCALING * (narrow[:, :r] @ B_gate.T), up + SCALING * (narrow[:, -r:] @ B_up.T)
    act = up * (silu(gate) if activation == "silu" else gelu(gate, approximate="tanh"))
    return [act.detach(), *torch.autograd.grad(act, gate_up, d_act), act.detach()]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [(ours.double() - right).norm().item() for ours, right in zip(found, exact, strict=True)]


def as_doubles(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [tensor if tensor is None else tensor.double() for tensor in tensors]


@pytest.mark.parametrize(("r", "parts"), PAIRS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_the_definition(r: int, parts: int, activation: str) -> None:
    tensors = glu_tensors(5, 6, r, parts, torch.float64)
    found, expected = in_place(ops, tensors, parts, activation), plain(tensors, activation)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("r", "parts"), PAIRS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_reference_rounds_no_more_than_pytorch(r: int, parts: int, activation: str, dtype: torch.dtype) -> None:
    tensors = glu_tensors(64, 96, r, parts, dtype)
    exact = plain(as_doubles(tensors), activation)
    found = in_place(ops, tensors, parts, activation)
    assert all(tensor.dtype == dtype for tensor in found)
    assert_within_twice(found, plain(tensors, activation), exact)


def assert_within_twice(found: list[Tensor], pytorch: list[Tensor], exact: list[Tensor]) -> None:
    ours, theirs = errors(found, exact), errors(pytorch, exact)
    assert all(mine <= 2 * other for mine, other in zip(ours, theirs, strict=True)), (ours, theirs)


def test_only_the_two_are_written() -> None:
    tensors = glu_tensors(5, 6, 3, 2, torch.float32)
    before = [tensor.clone() for tensor in tensors]
    glu_backward_(*tensors, SCALING, 2, "silu")
    assert [torch.equal(*pair) for pair in zip(tensors, before, strict=True)] == [False, True, True, False, True, True]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("tokens", [5, 0])
@pytest.mark.parametrize("r", [0, 3])
def test_ops_are_well_formed(tokens: int, r: int) -> None:
    tensors = glu_tensors(tokens, 6, r, 2, torch.bfloat16)
    torch.library.opcheck(glu, (*tensors[3:], SCALING, 2, "gelu_tanh"))
    torch.library.opcheck(glu_backward_, (*tensors, SCALING, 2, "gelu_tanh"))
