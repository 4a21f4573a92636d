"""The frozen linear function against plain autograd."""

from __future__ import annotations

import torch

from nybble.ops.linear import frozen_linear


def to_double(weight: torch.Tensor) -> torch.Tensor:
    return weight.double()


def test_gradients_equal_those_of_a_dense_linear() -> None:
    stored = torch.randn(5, 7)
    x, bias = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True), torch.randn(5).double().requires_grad_()
    grad = torch.randn(2, 3, 5, dtype=torch.float64)
    found = torch.autograd.grad(frozen_linear(x, bias, to_double, stored), (x, bias), grad)
    expected = torch.autograd.grad(torch.nn.functional.linear(x, stored.double(), bias), (x, bias), grad)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_gradcheck() -> None:
    stored = torch.randn(3, 4)
    x, bias = torch.randn(2, 4).double().requires_grad_(), torch.randn(3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, bias: frozen_linear(x, bias, to_double, stored), (x, bias))


def test_only_what_is_stored_is_saved() -> None:
    saved: list[torch.Tensor] = []
    stored = torch.randn(5, 7, dtype=torch.bfloat16)
    x = torch.randn(3, 7, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        frozen_linear(x, None, torch.Tensor.float, stored).sum().backward()
    assert [tensor.data_ptr() for tensor in saved] == [stored.data_ptr()]


def test_an_input_without_gradient_needs_no_weight_in_backward() -> None:
    calls = []
    bias = torch.randn(5, requires_grad=True)
    output = frozen_linear(torch.randn(3, 7), bias, lambda weight: calls.append(1) or weight, torch.randn(5, 7))
    output.sum().backward()
    assert len(calls) == 1
    assert torch.equal(bias.grad, torch.full((5,), 3.0))
