"""FlatAdamW: where things lie in memory, that it is AdamW, that it goes on to the bit, and what clipping does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from nybble.errors import UserError
from nybble.optim.adamw import build_optimizer
from nybble.optim.config import OptimConfig
from nybble.optim.flat import FlatAdamW

SHAPES = [(33, 7), (5,), (64, 64), (3, 256), (1,), (0, 4)]
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}


def parameters(*dtypes: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(d)) for d in dtypes or [torch.float32] for s in SHAPES]


def add_gradients(params: list[nn.Parameter], step: int, *, size: float = 1.0) -> None:
    """By a backward pass, in two parts that autograd adds up."""
    generator = torch.Generator().manual_seed(step)
    for parameter in params:
        for _ in range(2):
            (parameter.float() * size * torch.randn(parameter.shape, generator=generator)).sum().backward()


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        add_gradients(params, step)
        optimizer.step()
        optimizer.zero_grad()


def test_neighbours_stay_neighbours() -> None:
    params = parameters(torch.float32, torch.bfloat16)
    before = [parameter.detach().clone() for parameter in params]
    optimizer = FlatAdamW([{"params": params[1:]}, {"params": params[:1]}], **OPTIONS)
    assert all(torch.equal(p, value) and p.is_contiguous() for p, value in zip(params, before, strict=True))
    assert [flat.values.dtype for flat in optimizer.flats] == [torch.float32, torch.bfloat16, torch.float32]
    for flat in optimizer.flats:
        start = flat.values.data_ptr()
        for parameter in flat.parameters:
            if parameter.numel():
                assert parameter.data_ptr() == start
                assert (parameter.data_ptr() - flat.values.data_ptr()) % 16 == 0
            start += -(-parameter.numel() // 256) * 256 * parameter.element_size()
        assert start == flat.values.data_ptr() + flat.values.nbytes
    assert [flat.parameters[0] is p for flat, p in zip(optimizer.flats, (params[1], params[6], params[0]), strict=True)]


@pytest.mark.parametrize("state_bits", [32, 8])
def test_gradients_gather_in_place(state_bits: int) -> None:
    """Autograd adds to the flat buffer; zeroing keeps it; gradients that came otherwise are taken over."""
    params = parameters()
    optimizer = FlatAdamW(params, **OPTIONS, state_bits=state_bits)
    addresses = [parameter.grad.data_ptr() for parameter in params]
    add_gradients(params, 1)
    (flat,) = optimizer.flat_gradients()
    expected = parameters()
    add_gradients(expected, 1)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(params, expected, strict=True))
    assert flat.norm() == pytest.approx(torch.cat([p.grad.view(-1) for p in expected]).norm().item(), rel=1e-6)
    nn.ParameterList(params).zero_grad()
    assert all(parameter.grad is None for parameter in params)
    add_gradients(params[:3], 1)
    (flat,) = optimizer.flat_gradients()
    assert [parameter.grad.data_ptr() for parameter in params] == addresses
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(params[:3], expected, strict=False))
    assert not any(parameter.grad.any() for parameter in params[3:])
    optimizer.zero_grad()
    assert not flat.any()


def test_twenty_steps_are_those_of_adamw() -> None:
    """In fp64, with clipping, decay of one group only, and a learning rate that changes."""
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    options = {"lr": 1.0, "betas": (0.8, 0.95), "eps": 1e-6}

    def grouped(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": params[::2], "weight_decay": 0.1}, {"params": params[1::2], "weight_decay": 0.0}]

    flat, adamw = FlatAdamW(grouped(ours), **options), torch.optim.AdamW(grouped(theirs), **options)
    for step in range(20):
        for group in flat.param_groups:
            group["lr"].fill_(0.01 / (step + 1))
        for group in adamw.param_groups:
            group["lr"] = 0.01 / (step + 1)
        for params in (ours, theirs):
            add_gradients(params, step)
        assert flat.clip_(1.0) == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs, 1.0).item(), rel=1e-12)
        for optimizer in (flat, adamw):
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(ours, theirs, strict=True))


def test_a_learning_rate_may_be_a_number() -> None:
    ours, theirs = parameters(), parameters()
    by_number, by_tensor = FlatAdamW(ours, **OPTIONS), FlatAdamW(theirs, **OPTIONS)
    by_number.param_groups[0]["lr"] = 0.5
    by_tensor.param_groups[0]["lr"].fill_(0.5)
    train(by_number, ours, range(2))
    train(by_tensor, theirs, range(2))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("max_norm", [1.0, 0.0])
def test_a_norm_that_is_not_finite_changes_nothing(value: float, state_bits: int, max_norm: float) -> None:
    """Neither does the step count; the next step, whose norm is finite, is the second."""
    params = parameters()
    optimizer = FlatAdamW(params, **OPTIONS, state_bits=state_bits)
    train(optimizer, params, range(1))
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    add_gradients(params, 2)
    params[2].grad[3, 4] = value
    assert not optimizer.clip_(max_norm).isfinite()
    optimizer.step()
    optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(params, before[0], strict=True))
    assert_same_state(optimizer.state_dict()["state"], before[1])
    add_gradients(params, 2)
    assert optimizer.clip_(max_norm).isfinite()
    optimizer.step()
    assert optimizer.step_count == 2
    assert not torch.equal(params[2], before[0][2])


def assert_same_state(a: dict[int, dict[str, Tensor]], b: dict[int, dict[str, Tensor]]) -> None:
    assert a.keys() == b.keys()
    for index, state in a.items():
        assert state.keys() == b[index].keys()
        assert all(torch.equal(tensor, b[index][key]) for key, tensor in state.items())


def test_zero_does_not_clip() -> None:
    params = parameters()
    optimizer = FlatAdamW(params, **OPTIONS)
    add_gradients(params, 1, size=1e3)
    assert optimizer.clip_(0.0) > 1e3
    assert optimizer.gradient_scale == 1
    optimizer.clip_(1e9)
    assert optimizer.gradient_scale == 1


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_goes_on_to_the_bit(state_bits: int, dtype: torch.dtype) -> None:
    """Three steps, a copy of what is saved, three more: in the same and in a new optimizer, made with another rate."""
    straight = parameters(dtype)
    optimizer = FlatAdamW(straight, **OPTIONS, state_bits=state_bits)
    train(optimizer, straight, range(3))
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(straight)
    train(optimizer, straight, range(3, 6))

    resumed = FlatAdamW(weights, lr=5.0, state_bits=state_bits)
    lr, state = resumed.param_groups[0]["lr"], resumed.state[weights[0]]["exp_avg"]
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["lr"] is lr
    assert resumed.state[weights[0]]["exp_avg"] is state
    train(resumed, weights, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight, weights, strict=True))
    assert_same_state(optimizer.state_dict()["state"], resumed.state_dict()["state"])


def test_state_of_other_bits_is_refused() -> None:
    of_8_bits = FlatAdamW(parameters(), **OPTIONS, state_bits=8).state_dict()
    with pytest.raises(ValueError, match="state of parameter 0"):
        FlatAdamW(parameters(), **OPTIONS).load_state_dict(of_8_bits)


def test_bytes_of_the_state() -> None:
    """8-bit moments take 2 bytes a value and 8 a block of 256."""
    params = [nn.Parameter(torch.zeros(1024, 512))]
    optimizer = FlatAdamW(params, **OPTIONS, state_bits=8)
    held = sum(tensor.nbytes for tensor in optimizer.state[params[0]].values() if tensor.dim())
    assert held == params[0].numel() * (2 + 8 / 256)


def regression(optimizer_of: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer], seed: int) -> float:
    """Loss of a small network after 100 steps."""
    generator = torch.Generator().manual_seed(seed)
    inputs, inner, outer = (torch.randn(n, 64, generator=generator) for n in (512, 64, 64))
    targets = torch.tanh(inputs @ inner) @ outer
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, 128, bias=False), nn.Tanh(), nn.Linear(128, 64, bias=False))
    optimizer = optimizer_of(network.parameters())
    for _ in range(100):
        optimizer.zero_grad()
        loss = (network(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_8_bits_learn_as_bitsandbytes_does(seed: int) -> None:
    """At most twice as far from the loss of 32-bit moments."""
    exact = regression(lambda p: torch.optim.AdamW(p, **OPTIONS), seed)
    theirs = regression(lambda p: bnb.optim.AdamW8bit(p, **OPTIONS), seed)
    ours = regression(lambda p: FlatAdamW(p, **OPTIONS, state_bits=8), seed)
    assert abs(ours - exact) <= 2 * abs(theirs - exact)
    assert regression(lambda p: FlatAdamW(p, **OPTIONS), seed) == pytest.approx(exact, rel=1e-5)


def test_settings_reach_the_optimizer() -> None:
    config = OptimConfig(learning_rate=0.5, betas=(0.7, 0.8), eps=0.1, state_bits=8)
    optimizer = build_optimizer(nn.Linear(4, 3), config)
    assert isinstance(optimizer, FlatAdamW)
    assert [(g["lr"].item(), g["betas"], g["eps"]) for g in optimizer.param_groups] == [(0.5, (0.7, 0.8), 0.1)] * 2
    assert all(flat.moments["exp_avg"].dtype == torch.uint8 for flat in optimizer.flats)


def test_8_bits_need_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.optim.adamw.DistributedDataParallel", nn.Linear)
    module = nn.Linear(4, 3)
    assert isinstance(build_optimizer(module, OptimConfig()), torch.optim.AdamW)
    with pytest.raises(UserError, match="one process only"):
        build_optimizer(module, OptimConfig(state_bits=8))


def test_parameters_that_are_moved_are_not_lost_without_a_word() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = FlatAdamW([parameter], lr=0.1)
    optimizer.clip_(0.0)
    optimizer.step()
    parameter.data = parameter.data.clone()
    with pytest.raises(RuntimeError, match="were moved in memory"):
        optimizer.step()


def test_what_was_stacked_stays_side_by_side() -> None:
    """Parameters that are views of one tensor lie in the flat one as they lay in theirs."""
    stacked = torch.randn(512, 2)
    low, other, high = nn.Parameter(stacked[256:]), nn.Parameter(torch.randn(256)), nn.Parameter(stacked[:256])
    FlatAdamW([low, other, high], lr=0.1)
    assert low.data_ptr() == high.data_ptr() + high.nbytes
    assert low.grad.data_ptr() == high.grad.data_ptr() + high.grad.nbytes
    assert torch.equal(torch.cat([high, low]), stacked)


def test_groups_come_all_at_once() -> None:
    optimizer = FlatAdamW([nn.Parameter(torch.ones(3))], lr=0.1)
    with pytest.raises(RuntimeError, match="when it is built"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bucket_bytes", [1, 8192, 2**25])
def test_paged_moments_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, bucket_bytes: int, state_bits: int, dtype: torch.dtype
) -> None:
    """At home, on the device, and at home again; small buckets end within parameters."""
    monkeypatch.setattr("nybble.optim.flat.BUCKET_BYTES", bucket_bytes)
    ours, theirs = parameters(dtype), parameters(dtype)
    paged = FlatAdamW(ours, **OPTIONS, state_bits=state_bits, moments="paged")
    resident = FlatAdamW(theirs, **OPTIONS, state_bits=state_bits)
    for step in range(9):
        if step == 3:
            assert paged.restore_if_room()
        if step == 6:
            assert paged.evict()
        for optimizer, params in ((paged, ours), (resident, theirs)):
            add_gradients(params, step)
            optimizer.clip_(1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert_same_state(paged.state_dict()["state"], resident.state_dict()["state"])
        assert_same_state(dict(enumerate(paged.state.values())), dict(enumerate(resident.state.values())))


def test_resident_moments_stay() -> None:
    optimizer = FlatAdamW(parameters(), **OPTIONS)
    assert not optimizer.evict()
    assert optimizer.restore_if_room(2**62)
    assert optimizer.moves == 0


@pytest.mark.parametrize("state_bits", [32, 8])
def test_paged_moments_go_on_to_the_bit(state_bits: int) -> None:
    """From a state that was saved paged into resident moments, and the other way round."""
    straight = parameters()
    optimizer = FlatAdamW(straight, **OPTIONS, state_bits=state_bits)
    train(optimizer, straight, range(6))
    for first, second in (("paged", "resident"), ("resident", "paged")):
        params = parameters()
        before = FlatAdamW(params, **OPTIONS, state_bits=state_bits, moments=first)
        train(before, params, range(3))
        saved = copy.deepcopy(before.state_dict())
        after = FlatAdamW(params, **OPTIONS, state_bits=state_bits, moments=second)
        after.load_state_dict(saved)
        after.restore_if_room()
        train(after, params, range(3, 6))
        assert all(torch.equal(a, b) for a, b in zip(straight, params, strict=True))
        assert_same_state(optimizer.state_dict()["state"], after.state_dict()["state"])


def test_a_step_without_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = FlatAdamW(params, **OPTIONS, moments="paged")
    train(optimizer, params, range(1))
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    add_gradients(params, 1)

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patched:
        patched.setattr("nybble.memory.paging.torch.empty", fail)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before[0], strict=True))
    assert_same_state(optimizer.state_dict()["state"], before[1])
