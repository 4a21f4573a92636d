"""What is evaluated keeps to the memory settings: the same losses however weights are held, within what there is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.config import RunConfig
from nybble.errors import UserError
from nybble.evaluation.run import Wanted, evaluate_model
from nybble.inference import load_for_inference, load_within_plan
from nybble.memory.host_matrix import HostEmbedding, HostLinear
from nybble.memory.stream import LayerStream
from nybble.models.generate_batch import generate_batch
from nybble.planner.evaluation import Held, Sequences
from nybble.units import parse_bytes

# Layers that are large beside all else, so that streaming them is seen in a budget.
LARGE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}
PLACES = ("resident", "streamed", "disk")
WORK = [Sequences(4, 64)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"text": f"The answer to question {number} is {number * number}. " * 3} for number in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def config_of(model: Path, data: Path | str = "d", **memory: Any) -> RunConfig:
    settings = {"model.name": str(model), "data.path": str(data), "output": "o", "data.max_length": 64}
    return RunConfig.read(None, settings | {f"memory.{name}": value for name, value in memory.items()})


def held_by(config: RunConfig, work: list[Sequences] = WORK) -> Held:
    return load_within_plan(config, work=work)[1]


def loss_of(config: RunConfig, adapter: Path | None = None) -> float:
    found = evaluate_model(config, Wanted(), adapter=adapter).held_out
    assert found is not None
    return found.loss


@pytest.fixture(scope="module")
def adapter(tiny: Callable[..., Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from nybble.train.run import run_training

    more = {"output": str(tmp_path_factory.mktemp("runs") / "lora"), "method": "lora", "data.max_length": 64}
    more |= {"train.max_steps": 4, "optim.learning_rate": 0.02, "lora.target_modules": "all-linear"}
    return run_training(config_of(tiny("llama"), data).changed(more), quiet=True).folder


@pytest.mark.parametrize("with_adapter", [False, True])
def test_losses_are_the_same_bits_wherever_weights_lie(
    tiny: Callable[..., Path], data: Path, adapter: Path, with_adapter: bool
) -> None:
    used = adapter if with_adapter else None
    config = config_of(tiny("llama"), data)
    expected = loss_of(config, used)
    assert (expected != loss_of(config)) == with_adapter
    for weights in PLACES:
        assert loss_of(config_of(tiny("llama"), data, weights=weights), used) == expected, weights
    # Under a head in host memory the loss adds up in another order.
    away = loss_of(config_of(tiny("llama"), data, weights="streamed", embedding="host", head="host"), used)
    assert away == pytest.approx(expected, rel=1e-6)


def test_weights_in_nf4_stream_too(tiny: Callable[..., Path], data: Path) -> None:
    in_nf4 = {"model.storage": "nf4"}
    resident, streamed = (
        loss_of(config_of(tiny("smollm"), data, weights=weights).changed(in_nf4)) for weights in PLACES[:2]
    )
    assert resident == streamed


def test_settings_are_carried_out(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []

    class Seen(LayerStream):
        def ready(self, layer: int) -> None:
            super().ready(layer)
            used.append(layer)

    monkeypatch.setattr("nybble.train.fuse.LayerStream", Seen)
    loaded, held = load_within_plan(config_of(tiny("llama"), weights="streamed", embedding="host", head="host"))
    generate_batch(loaded.model, [[3, 4], [5]], max_new_tokens=2, stops=frozenset())
    assert used == [0, 1, 0, 1]
    assert isinstance(loaded.model.get_input_embeddings(), HostEmbedding)
    assert isinstance(loaded.model.get_output_embeddings(), HostLinear)
    assert list(held.plan.streamed()) == [0, 1]


def test_by_default_a_model_is_loaded_as_without_a_plan(tiny: Callable[..., Path]) -> None:
    config = config_of(tiny("llama"))
    loaded, held = load_within_plan(config, work=WORK)
    assert (held.plan.streamed(), held.plan.embedding, held.plan.head) == ([], "device", "device")
    assert held.batch(4) == 4
    plain = load_for_inference(config.model).model
    assert [type(module) for module in loaded.model.modules()] == [type(module) for module in plain.modules()]
    for name, parameter in plain.state_dict().items():
        assert torch.equal(parameter, loaded.model.state_dict()[name])


def test_auto_streams_where_only_that_fits(tiny: Callable[..., Path], data: Path) -> None:
    model = tiny("llama", **LARGE)
    most, least = (held_by(config_of(model, weights=weights)).device_bytes for weights in PLACES[:2])
    assert most - least > 30 * 2**20
    ample = held_by(config_of(model, budget=f"{2 * most // 2**20}M"))
    assert ample.plan.streamed() == []
    between = f"{(most + least) // 2 // 2**20}M"
    some = held_by(config_of(model, budget=between))
    assert 0 < len(some.plan.streamed()) < 12
    assert least < some.device_bytes <= parse_bytes(between)
    assert loss_of(config_of(model, data, budget=between)) == loss_of(config_of(model, data))


def test_what_does_not_fit_is_refused_before_weights_are_read(
    tiny: Callable[..., Path], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr("nybble.inference.load_model", load)
    with pytest.raises(UserError, match=r"memory: the model does not fit: loading would need .*are 1\.00 MiB") as told:
        loss_of(config_of(tiny("llama"), data, budget="1MiB"))
    assert told.value.fix is not None
    assert told.value.fix.startswith("The smallest change that fits: memory.budget=")


def test_the_change_that_is_advised_fits(tiny: Callable[..., Path]) -> None:
    model = tiny("llama", **LARGE)
    with pytest.raises(UserError) as told:
        held_by(config_of(model, budget="1MiB"))
    advised = str(told.value.fix).rpartition("memory.budget=")[2].split()[0]
    assert len(held_by(config_of(model, budget=advised)).plan.streamed()) == 12
    with pytest.raises(UserError) as told:
        held_by(config_of(model, budget=advised, weights="resident"))
    assert "memory.weights=auto" in str(told.value.fix)


def test_batches_are_made_smaller_before_weights_are_sent_away(tiny: Callable[..., Path]) -> None:
    """On a CPU copies are as fast as memory, so half a batch costs what streaming all of it does."""
    model = tiny("llama")
    one, many = (held_by(config_of(model, weights="resident"), [Sequences(count, 4096)]) for count in (1, 64))
    budget = f"{(one.device_bytes + many.device_bytes) // 2 // 2**20}M"
    held = held_by(config_of(model, budget=budget), [Sequences(64, 4096), Sequences(2, 8)])
    assert held.parts > 1
    assert (held.batch(64), held.batch(2)) == (64 // held.parts, max(1, 2 // held.parts))
    assert held.device_bytes <= parse_bytes(budget)


def test_keys_and_values_of_answers_count(tiny: Callable[..., Path]) -> None:
    config = config_of(tiny("llama"), weights="resident")
    figures = [held_by(config, [Sequences(8, 16, kept=kept)]).phases["evaluation"].device_bytes for kept in (0, 100)]
    assert figures[1] - figures[0] == 8 * 100 * 2 * 2 * 16 * 4 * (2 + 1)  # 2 heads of 16 values in fp32


def test_of_an_unknown_model_settings_are_heeded(tiny: Callable[..., Path], data: Path) -> None:
    model = tiny("gpt2")
    assert loss_of(config_of(model, data, weights="streamed")) == loss_of(config_of(model, data))
    assert len(held_by(config_of(model, weights="streamed")).plan.streamed()) == 2
