"""An embedding and a head in host memory compute what those on the device do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nybble.memory import host_matrix
from nybble.memory.host_matrix import HostEmbedding, HostLinear
from nybble.quant.linear import DenseEmbedding, DenseLinear

CPU = torch.device("cpu")


def random_embedding(stored: torch.dtype, compute: torch.dtype, scale: float) -> DenseEmbedding:
    embedding = DenseEmbedding(50, 24, 3, compute_dtype=compute, scale=scale, dtype=stored)
    return embedding.requires_grad_(False)


def random_linear(stored: torch.dtype, compute: torch.dtype, *, bias: bool) -> DenseLinear:
    linear = DenseLinear(24, 50, bias, compute_dtype=compute, dtype=stored)
    return linear.requires_grad_(False)


@pytest.mark.parametrize("scale", [1.0, 4.9])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_embedding(compute: torch.dtype, scale: float) -> None:
    embedding = random_embedding(torch.float32, compute, scale)
    on_host = HostEmbedding.taking(embedding)
    assert on_host.weight is embedding.weight
    ids = torch.randint(50, (2, 7))
    assert torch.equal(on_host(ids), embedding(ids))
    assert on_host(ids).dtype == compute


@pytest.mark.parametrize("rows_a_chunk", [1, 16, 50])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_linear(stored: torch.dtype, bias: bool, rows_a_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_matrix, "_CHUNK_BYTES", rows_a_chunk * 24 * stored.itemsize)
    linear = random_linear(stored, torch.float32, bias=bias)
    on_host = HostLinear.taking(linear, CPU)
    assert on_host.weight is linear.weight
    assert list(on_host.state_dict()) == list(linear.state_dict())
    x = torch.randn(2, 7, 24, requires_grad=True)
    weights = torch.randn(2, 7, 50)
    found, expected = on_host(x), linear(x)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), x),
        torch.autograd.grad((expected * weights).sum(), x),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_linear_computes_in_its_compute_dtype() -> None:
    linear = random_linear(torch.float32, torch.bfloat16, bias=True)
    assert torch.equal(HostLinear.taking(linear, CPU)(torch.ones(3, 24)), linear(torch.ones(3, 24)))


def test_tied_ones_share_their_memory() -> None:
    linear = random_linear(torch.float32, torch.float32, bias=False)
    embedding = random_embedding(torch.float32, torch.float32, 1.0)
    embedding.weight = linear.weight
    ends = nn.ModuleList([HostEmbedding.taking(embedding), HostLinear.taking(linear, CPU)])
    assert len(list(ends.parameters())) == 1
