"""What autograd saves, in pinned host memory between the passes, on a card."""

from __future__ import annotations

import pytest
import torch

from nybble.memory.saved import SavedOnHost
from tests.memory.test_saved import gradients

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")


def inputs(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return [torch.randn(256, 256, device=DEVICE, generator=generator) / 16 for _ in range(4)]


def test_gradients_are_those_of_what_stayed() -> None:
    home = SavedOnHost(DEVICE)
    for seed in range(3):
        x, *weights = inputs(seed)
        assert all(map(torch.equal, gradients(x, weights, home), gradients(x, weights, None)))
    assert home.host_bytes


def test_copies_are_recorded_in_a_graph() -> None:
    home = SavedOnHost(DEVICE)
    x, *weights = given = inputs(0)
    gradients(x, weights, home)  # host memory is locked
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(x, weights, home)
    for seed in (1, 2):
        for place, tensor in zip(given, inputs(seed), strict=True):
            place.copy_(tensor)
        graph.replay()
        assert all(map(torch.equal, found, gradients(x, weights, None)))
