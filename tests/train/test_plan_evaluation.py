"""How a model is held that is measured, on cards that are not here: 8B in 16 and in 4 bits."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, Literal

import pytest

from nybble.adapters.config import LoraConfig
from nybble.config import RunConfig
from nybble.errors import UserError
from nybble.planner.cards import card
from nybble.planner.evaluation import Held, Sequences
from nybble.planner.run_shape import RunShape
from nybble.train.plan_evaluation import plan_evaluation

EIGHT_B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}
GIB = 2**30


def held_on(
    name: str,
    method: Literal["lora", "qlora"] = "lora",
    *,
    host: int = 64 * GIB,
    lora: LoraConfig | None = None,
    model: dict[str, Any] = EIGHT_B,
    **settings: Any,
) -> Held:
    config = RunConfig.read(None, {"model.name": "m", "data.path": "d", "output": "o"} | settings)
    work = [Sequences(4, 2048), Sequences(16, 512, kept=640)]
    device, run = card(name).with_host(host), RunShape(method=method, fused=False)
    return plan_evaluation(config, model, device, run, work, lora=lora, in_files=method == "lora")


def test_nothing_imports_torch() -> None:
    code = "import sys, nybble.train.plan_evaluation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_as_much_as_fits_lies_on_the_card() -> None:
    """First the embedding leaves, which costs nothing; then layers, as few as need be."""
    large, middle, small = (held_on(name) for name in ("rtx 4090", "rtx 4060 ti 16gb", "rtx 3060 12gb"))
    assert (large.plan.streamed(), large.plan.embedding, large.parts) == ([], "device", 1)
    assert (middle.plan.embedding, middle.plan.head) == ("host", "device")
    assert 0 < len(middle.plan.streamed()) < len(small.plan.streamed()) < 32
    assert held_on("rtx 3060 12gb", "qlora").plan.streamed() == []
    for held, gib in ((large, 23.5), (middle, 15.6), (small, 11.65)):
        assert held.device_bytes <= gib * GIB


def test_layers_stay_on_disk_where_the_host_has_no_room() -> None:
    held = held_on("rtx 3060 12gb", host=3 * GIB)
    assert {layer.weights for layer in held.plan.layers} == {"resident", "disk"}
    streamed = {"memory.weights": "streamed"}
    with pytest.raises(
        UserError, match=r"does not fit: it would need .* of host memory, and there are 3\.00 GiB"
    ) as told:
        held_on("rtx 3060 12gb", host=3 * GIB, **streamed)
    assert "memory.weights=auto" in str(told.value.fix)
    with pytest.raises(UserError, match=r"does not fit: .* and there are 1\.00 GiB\nTake a smaller model"):
        held_on("rtx 3060 12gb", "qlora", host=GIB, model=EIGHT_B | {"num_hidden_layers": 320})


def test_the_smallest_change_leaves_the_figures_as_they_are_if_it_can() -> None:
    with pytest.raises(UserError, match=r"The smallest change that fits: memory\.weights=auto \("):
        held_on("rtx 3060 12gb", **{"memory.weights": "resident"})
    fixed = {"memory.weights": "resident", "memory.budget": "2300MiB"}
    with pytest.raises(UserError, match=r"fits: memory\.weights=auto model\.storage=nf4 \("):
        held_on("rtx 4090", **fixed)
    with pytest.raises(UserError, match=r"would need .*, and there are 1\.00 GiB\n.*: memory\.budget=\d+MiB"):
        held_on("rtx 4090", **{"memory.budget": "1GiB"})


def test_an_adapter_counts_and_what_it_changes_lies_on_the_card() -> None:
    pairs = held_on("h100", lora=LoraConfig(r=16)).device_bytes - held_on("h100").device_bytes
    trained = 16 * 32 * (2 * 4096 + 2 * (4096 + 1024) + 2 * 4096 + 3 * (4096 + 14336))
    assert pairs == pytest.approx(4 * trained, rel=0.01)
    with pytest.raises(UserError, match=r"memory\.head: what is trained cannot lie in host memory"):
        held_on("h100", lora=LoraConfig(target_modules=("lm_head", "q_proj")), **{"memory.head": "host"})


def test_of_training_nothing_is_looked_at() -> None:
    training = {"memory.activations": "recompute", "memory.moments": "paged", "memory.span": 2}
    assert held_on("rtx 4090", **training) == held_on("rtx 4090")
    unknown = held_on("rtx 4090", model={"model_type": "gpt2", "n_layer": 3}, **training)
    assert [layer.activations for layer in unknown.plan.layers] == ["keep"] * 3
