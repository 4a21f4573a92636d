"""Rows gathered by a card, from its own memory and over the bus."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble.memory.pinned import pinned
from nybble.ops.gather import gather_rows

pytestmark = pytest.mark.gpu


@pytest.fixture
def matrix() -> Tensor:
    return torch.randn(1000, 5000).bfloat16()


def test_rows_on_the_card(matrix: Tensor) -> None:
    index = torch.randint(1000, (77,))
    assert torch.equal(gather_rows(matrix.cuda(), index.cuda()).cpu(), matrix[index])


def test_rows_in_host_memory(matrix: Tensor) -> None:
    memory = pinned(matrix.nbytes)
    on_host = memory.view(matrix.dtype).view(matrix.shape).copy_(matrix)
    index = torch.randint(1000, (77,))
    found = gather_rows(on_host, index.cuda())
    assert found.is_cuda
    assert torch.equal(found.cpu(), matrix[index])
    assert gather_rows(on_host, index[:0].cuda()).shape == (0, 5000)
    assert gather_rows(on_host, torch.tensor([1000, -1], device="cuda")).isnan().all()


def test_recorded_in_a_graph(matrix: Tensor) -> None:
    memory = pinned(matrix.nbytes)
    on_host = memory.view(matrix.dtype).view(matrix.shape).copy_(matrix)
    index = torch.randint(1000, (77,), device="cuda")
    gather_rows(on_host, index)  # compiled
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gather_rows(on_host, index)
    index.copy_(torch.randint(1000, (77,)))
    graph.replay()
    assert torch.equal(found.cpu(), matrix[index.cpu()])
    torch.cuda.synchronize()
