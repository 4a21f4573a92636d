"""FlatAdamW on a card: nothing waits for the device, and a CUDA graph holds a whole update."""

from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
from torch import nn

from nybble.optim.flat import FlatAdamW

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")]

SHAPES = [(300, 70), (5,), (1024, 1024)]
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}


Place = Literal["resident", "paged"]


def make(
    dtype: torch.dtype, state_bits: Literal[32, 8], moments: Place = "resident"
) -> tuple[list[nn.Parameter], FlatAdamW]:
    generator = torch.Generator("cuda").manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator, device="cuda").to(dtype)) for s in SHAPES]
    return params, FlatAdamW(params, **OPTIONS, state_bits=state_bits, moments=moments)


def update(optimizer: FlatAdamW, max_norm: float = 1.0) -> torch.Tensor:
    norm = optimizer.clip_(max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def fill_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator("cuda").manual_seed(step)
    for parameter in params:
        parameter.grad.normal_(generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_the_card_as_on_the_host(dtype: torch.dtype) -> None:
    """Five steps may differ by five roundings of the parameter and of the four results that make an update of it."""
    params, optimizer = make(dtype, 32)
    host = [nn.Parameter(parameter.detach().cpu()) for parameter in params]
    reference = FlatAdamW(host, **OPTIONS)
    for step in range(5):
        fill_gradients(params, step)
        for parameter, other in zip(params, host, strict=True):
            other.grad.copy_(parameter.grad)
        exact = torch.stack([other.grad.double().square().sum() for other in host]).sum().sqrt().item()
        update(reference, 0.0)
        assert update(optimizer, 0.0).item() == pytest.approx(exact, rel=1e-5)
    for parameter, other in zip(params, host, strict=True):
        of_update = 4 * torch.finfo(torch.float32).eps * OPTIONS["lr"]
        allowed = 5 * (torch.finfo(dtype).eps * other.abs().float() + of_update)
        assert ((parameter.detach().cpu().float() - other.float()).abs() <= allowed).all()


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine of 32-bit moments, which is more than there are buffers."""
    monkeypatch.setattr("nybble.optim.flat.BUCKET_BYTES", 2**20)


@pytest.mark.parametrize("moments", ["resident", "paged"])
@pytest.mark.parametrize("state_bits", [32, 8])
def test_nothing_waits_for_the_device(state_bits: Literal[32, 8], moments: Place) -> None:
    params, optimizer = make(torch.float32, state_bits, moments)
    update(optimizer)  # compiles the kernels, makes tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        fill_gradients(params, 1)
        optimizer.param_groups[0]["lr"].fill_(1e-3)
        update(optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("moments", ["resident", "paged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state_bits", [32, 8])
def test_a_graph_of_the_update(dtype: torch.dtype, state_bits: Literal[32, 8], moments: Place) -> None:
    """Replayed with other gradients and learning rates, one norm not finite, it gives the bits of the eager update."""
    params, optimizer = make(dtype, state_bits, moments)
    results = []
    start = copy.deepcopy((params, optimizer.state_dict()))
    fill_gradients(params, 0)
    update(optimizer)  # compiles the kernels, makes tables
    for as_graph in (False, True):
        with torch.no_grad():
            for parameter, value in zip(params, start[0], strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(start[1])
        graph = torch.cuda.CUDAGraph()
        if as_graph:
            with torch.cuda.graph(graph):
                update(optimizer)
        for step in range(4):
            fill_gradients(params, step)
            if step == 2:
                params[0].grad[1, 1] = torch.inf
            optimizer.param_groups[0]["lr"].fill_(0.01 / (step + 1))
            graph.replay() if as_graph else update(optimizer)
        assert optimizer.step_count == 3  # and all is done: moments at home can be read
        results.append([tensor.clone() for tensor in (*params, *optimizer.flats[0].moments.values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state_bits", [32, 8])
def test_paged_moments_give_the_same_bits(dtype: torch.dtype, state_bits: Literal[32, 8]) -> None:
    """At home, on the device and at home again, on a stream of the caller's as well."""
    params, paged = make(dtype, state_bits, "paged")
    others, resident = make(dtype, state_bits)
    side = torch.cuda.Stream()
    for step in range(30):
        if step == 10:
            assert paged.restore_if_room()
        if step == 20:
            assert paged.evict()
        fill_gradients(others, step)
        update(resident)
        fill_gradients(params, step)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side if step % 2 else torch.cuda.current_stream()):
            update(paged)
        torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    ours, theirs = paged.state_dict()["state"], resident.state_dict()["state"]
    for index, state in ours.items():
        assert state["exp_avg"].device.type == "cpu"
        assert all(torch.equal(tensor.cuda(), theirs[index][key]) for key, tensor in state.items())
