"""A base that several runs share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nybble.adapters.config import LoraConfig
from nybble.adapters.inject import adapter_names, inject
from nybble.compare import peaks
from nybble.compare.peaks import Meter
from nybble.compare.resident import ResidentBase, base_key, may_stay
from nybble.config import RunConfig
from nybble.models.config import ModelConfig
from nybble.models.load import LoadedModel, load_model
from nybble.plan import MemoryPlan
from nybble.train.activation_checkpointing import enable_activation_checkpointing

CPU = torch.device("cpu")


@pytest.fixture
def load(tiny: Callable[..., Path]) -> Callable[[], LoadedModel]:
    config = ModelConfig(name=str(tiny("llama")), storage="nf4")
    return lambda: load_model(config, device=CPU)


@pytest.fixture
def resident() -> ResidentBase:
    return ResidentBase(Meter(CPU), test=None, chooses=False)


def test_what_a_run_put_on_is_taken_off(resident: ResidentBase, load: Callable[[], LoadedModel]) -> None:
    loaded = resident.borrow(load)
    tokens = torch.randint(0, 400, (1, 9))
    names, before = [name for name, _ in loaded.model.named_parameters()], loaded.model(tokens).logits
    inject(loaded.model, LoraConfig(r=2))
    loaded.model.train()
    enable_activation_checkpointing(loaded.model)
    resident.take_back()
    again = resident.borrow(load)
    assert again.model is loaded.model
    assert adapter_names(again.model) == ()
    assert [name for name, _ in again.model.named_parameters()] == names
    assert not any(parameter.requires_grad for parameter in again.model.parameters())
    assert not any(module.training for module in again.model.modules())
    assert not again.model.is_activation_checkpointing
    assert torch.equal(again.model(tokens).logits, before)


def test_a_base_whose_bits_changed_is_loaded_anew(resident: ResidentBase, load: Callable[[], LoadedModel]) -> None:
    loaded = resident.borrow(load)
    packed = next(weight for weight in loaded.model.parameters() if weight.dtype == torch.uint8)
    packed.data.view(-1)[0] ^= 1
    resident.take_back()
    assert resident.borrow(load).model is not loaded.model


def test_only_runs_that_leave_the_base_as_it_is_share_it() -> None:
    def config(**settings: object) -> RunConfig:
        given = {"model.name": "m", "data.path": "d", "output": "o", **settings}
        return RunConfig.read(None, {name.replace("__", "."): value for name, value in given.items()})

    lora = config(method="lora")
    assert base_key(lora) == base_key(config(method="lora", lora__r=64, optim__learning_rate=1e-3, train__seed=5))
    assert base_key(lora) != base_key(config(method="qlora"))
    assert base_key(config(method="qlora")) == base_key(config(method="lora", model__storage="nf4"))
    assert base_key(config(method="full")) != base_key(config(method="lora", model__storage="fp32"))
    assert base_key(lora) != base_key(config(method="lora", memory__budget="8GiB"))
    assert base_key(config(method="lora", lora__init="pissa")) != base_key(lora)
    assert may_stay(lora, MemoryPlan.uniform(2, "recompute"))
    assert not may_stay(lora, MemoryPlan.uniform(2, weights="streamed"))
    assert not may_stay(config(method="full"), MemoryPlan.uniform(2))


def test_energy_is_that_of_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    joules = iter([5.0, 12.0])
    monkeypatch.setattr(peaks, "_counter", lambda _: lambda: next(joules))
    meter = peaks.EnergyMeter(CPU)
    assert meter.stop() == (None, None)
    meter.start()
    used, seconds = meter.stop()
    assert used == 7.0
    assert seconds is not None
    assert seconds > 0
    assert meter.stop() == (None, None)  # of a run that went on from a checkpoint: it was not begun


def test_peaks_are_those_of_their_phase() -> None:
    meter = Meter(CPU)
    with meter.phase("large"):
        torch.ones(64 * 2**20)
    with meter.phase("small"):
        torch.ones(2**20)
    large, small = meter.phases["large"], meter.phases["small"]
    assert large.host_bytes - small.host_bytes > 200 * 2**20
    assert large.device_bytes is None
