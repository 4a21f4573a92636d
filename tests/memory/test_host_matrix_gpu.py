"""An embedding and a head in host memory, read by a card: pinned once, the same numbers, and within a graph."""

from __future__ import annotations

import pytest
import torch

from nybble.memory import host_matrix
from nybble.memory.host_matrix import HostEmbedding, HostLinear, keep_on_host
from nybble.memory.passage import passing
from nybble.memory.pinned import pinned
from nybble.memory.transfer import SideStream
from nybble.quant.linear import DenseEmbedding, DenseLinear

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)


def random_linear(device: str) -> DenseLinear:
    linear = DenseLinear(256, 5000, compute_dtype=torch.bfloat16, dtype=torch.bfloat16, device=device)
    return linear.requires_grad_(False)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_parameters_move_to_locked_memory(device: str) -> None:
    parameter = random_linear(device).weight
    before = parameter.detach().cpu().clone()
    keep_on_host(parameter)
    assert parameter.device.type == "cpu"
    assert parameter.is_pinned()
    assert torch.equal(parameter, before)
    place = parameter.data_ptr()
    keep_on_host(parameter)
    assert parameter.data_ptr() == place


@pytest.mark.parametrize("scale", [1.0, 4.9])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_embedding(device: str, scale: float) -> None:
    embedding = DenseEmbedding(500, 256, compute_dtype=torch.bfloat16, scale=scale, dtype=torch.float32)
    ids = torch.randint(500, (2, 70), device=CUDA)
    expected = embedding.to(CUDA)(ids)
    on_host = HostEmbedding.taking(embedding.to(device).requires_grad_(False))
    found = on_host(ids)
    assert on_host.weight.device.type == "cpu"
    assert torch.equal(found, expected)


def test_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_matrix, "_CHUNK_BYTES", 600 * 512)
    linear = random_linear("cuda")
    x = torch.randn(300, 256, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    expected = linear(x)
    (d_expected,) = torch.autograd.grad(expected.float().square().sum(), x)
    on_host = HostLinear.taking(linear, CUDA)
    assert on_host.bias.device.type == "cuda"
    for _ in range(3):
        found = on_host(x)
        (d_found,) = torch.autograd.grad(found.float().square().sum(), x)
        # One product or several: cuBLAS may sum in another order.
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)
        torch.testing.assert_close(d_found, d_expected, rtol=2**-5, atol=2**-5 * d_expected.abs().max().item())


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_passages_wait_nowhere_and_can_be_recorded() -> None:
    memory = pinned(64 * 2**20).view(torch.float32).view(-1, 1024)
    memory.normal_()
    side = SideStream(CUDA)
    sums = torch.zeros(len(memory), device=CUDA)

    def add_up() -> None:
        with passing(memory, side, 1000, passes=2) as passage:
            for _ in range(2):
                for first, chunk in passage.chunks():
                    sums[first : first + len(chunk)] += chunk.sum(1)

    torch.cuda.set_sync_debug_mode("error")
    try:
        add_up()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(sums.cpu(), 2 * memory.sum(1), rtol=1e-4, atol=1e-3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add_up()
    sums.zero_()
    memory.mul_(2)
    for _ in range(3):
        graph.replay()
    torch.testing.assert_close(sums.cpu(), 6 * memory.sum(1), rtol=1e-4, atol=1e-2)
