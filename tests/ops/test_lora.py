"""The adapted linear as one region, against the same sums in plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from nybble.ops.lora import lora_linear

SCALING = 0.7


def tensors(dtype: torch.dtype, device: str = "cpu", tokens: tuple[int, ...] = (2, 3)) -> list[Tensor]:
    """x, A, B, bias and the stored weight; in = 40, out = 24, r = 4."""
    shapes = [(*tokens, 40), (4, 40), (24, 4), (24,), (24, 40)]
    made = [torch.randn(shape, dtype=torch.float64).div_(shape[-1] ** 0.5).to(device, dtype) for shape in shapes]
    return [tensor.requires_grad_(index < 4) for index, tensor in enumerate(made)]


def definition(x: Tensor, A: Tensor, B: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    return linear(x, weight, bias) + SCALING * linear(linear(x, A.to(x.dtype)), B.to(x.dtype))


def region(x: Tensor, A: Tensor, B: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
    return lora_linear(x, (A, B, SCALING), bias, Tensor.clone, weight)


def test_output_and_gradients_are_those_of_the_definition() -> None:
    x, A, B, bias, weight = tensors(torch.float64)
    grad = torch.randn(2, 3, 24, dtype=torch.float64)
    ours, expected = (f(x, A, B, bias, weight) for f in (region, definition))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-14)
    found = torch.autograd.grad(ours, (x, A, B, bias), grad)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (x, A, B, bias), grad), rtol=0, atol=1e-13)


def test_gradcheck() -> None:
    x, A, B, bias, weight = tensors(torch.float64)
    assert torch.autograd.gradcheck(lambda *inputs: region(*inputs, weight), (x, A, B, bias))


def test_no_tokens() -> None:
    x, A, B, bias, weight = tensors(torch.float32, tokens=(0,))
    output = region(x, A, B, bias, weight)
    assert output.shape == (0, 24)
    output.sum().backward()
    assert torch.equal(A.grad, torch.zeros_like(A))


def test_gradients_come_in_the_dtype_that_the_pair_is_held_in() -> None:
    x, A, B, bias, weight = tensors(torch.float32)
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in (A, B)]
    region(x, *half, bias, weight).sum().backward()
    assert [tensor.grad.dtype for tensor in half] == [torch.bfloat16] * 2


def test_only_the_input_its_narrow_product_and_what_is_stored_are_saved() -> None:
    saved: list[Tensor] = []
    x, A, B, bias, weight = tensors(torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        region(x, A, B, bias, weight).sum().backward()
    assert [tuple(tensor.shape) for tensor in saved] == [(2, 3, 40), (6, 4), (4, 40), (24, 4), (24, 40)]
    assert saved[-1].data_ptr() == weight.data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_on_a_gpu(dtype: torch.dtype) -> None:
    """At most twice the error of the same sums in PyTorch, both against float64; the pair is held in fp32."""
    x, A, B, bias, weight = tensors(dtype, "cuda", tokens=(512,))
    A, B = (tensor.detach().float().requires_grad_() for tensor in (A, B))
    grad = torch.randn(512, 24, device="cuda", dtype=dtype)
    inputs = (x, A, B, bias)
    doubles = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in (*inputs, weight)]
    exact_output = definition(*doubles)
    exact = [exact_output, *torch.autograd.grad(exact_output, doubles[:4], grad.double())]
    errors = []
    for f in (region, definition):
        output = f(*inputs, weight)
        found = [output, *torch.autograd.grad(output, inputs, grad)]
        errors.append([(mine.double() - right).norm().item() for mine, right in zip(found, exact, strict=True)])
    assert all(ours <= 2 * torchs for ours, torchs in zip(*errors, strict=True)), errors
