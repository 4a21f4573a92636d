"""Plans of whole runs on a GPU: carried out as the settings say, within the budget, with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nybble.config import RunConfig
from nybble.train.run import run_training

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("own_allocator")]

GIB = 2**30
PLANS: dict[str, dict[str, Any]] = {
    "kept": {"memory.activations": "keep", "memory.weights": "resident"},
    "normed again": {"memory.activations": "keep_matmuls"},
    "on the host": {"memory.activations": "keep_on_host", "memory.weights": "streamed"},
    "lean": {
        "memory.activations": "offload",
        "memory.weights": "streamed",
        "memory.embedding": "host",
        "memory.moments": "paged",
    },
    "spans": {"memory.activations": "recompute", "memory.span": 2, "memory.weights": "streamed"},
}


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_what_memory_holds_is_not_what_is_computed(
    settings: Callable[..., RunConfig], tmp_path: Path, method: str
) -> None:
    results = {}
    for name, changes in PLANS.items():
        same = {"method": method, "train.deterministic": True, "train.max_steps": 4, "output": str(tmp_path / name)}
        result = run_training(settings("qwen3", **changes, **same), quiet=True)
        assert result.summary["memory"]["stock_modules"] is None
        results[name] = result.losses, load_file(result.folder / "adapter_model.safetensors")
    losses, adapter = results["kept"]
    for name, (other_losses, other_adapter) in results.items():
        assert other_losses == losses, name
        assert all(torch.equal(other_adapter[key], tensor) for key, tensor in adapter.items()), name


def test_a_head_on_the_host_is_multiplied_by_other_chunks(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    ends = {"memory.embedding": "host", "memory.head": "host"}
    losses = [
        run_training(settings("llama", **changes, output=str(tmp_path / str(len(changes)))), quiet=True).losses
        for changes in ({}, ends)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


@pytest.mark.parametrize("stock", [False, True])
def test_a_run_keeps_to_its_budget_and_is_held_against_its_prediction(
    settings: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str], stock: bool
) -> None:
    config = settings(**{"method": "qlora", "memory.budget": "3GiB", "train.fused": not stock, "train.max_steps": 6})
    result = run_training(config)
    peak = result.summary["device_peak"]
    assert 0 < peak["reserved_bytes"] + peak["beyond_bytes"] <= 3 * GIB
    assert result.summary["memory"]["predicted"]["budget_bytes"] == 3 * GIB
    shown = capsys.readouterr().err
    assert "plan: activations kept" in shown
    assert "predicted: " in shown
    assert "measured: peak " in shown


def test_stock_modules_stream_too(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    same = {"method": "qlora", "train.fused": False, "train.deterministic": True, "memory.activations": "recompute"}
    runs = [
        run_training(settings(**same, **changes, output=str(tmp_path / str(len(changes)))), quiet=True)
        for changes in ({}, {"memory.weights": "streamed", "memory.embedding": "host"})
    ]
    assert runs[0].losses == runs[1].losses
