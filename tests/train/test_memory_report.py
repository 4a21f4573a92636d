"""The page of a run's memory: of the second step, whatever computes it; afterwards nothing is followed any more."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nybble.adapters.config import LoraConfig
from nybble.adapters.inject import inject
from nybble.config import RunConfig
from nybble.memory.ledger import Unobserved
from nybble.models.fused.body import FusedBody
from nybble.models.fused.loss import FusedCausalLMLoss
from nybble.models.loss import CausalLMLoss
from nybble.optim.flat import FlatAdamW
from nybble.plan import MemoryPlan
from nybble.train.loop import StepResult
from nybble.train.memory_report import MemoryReport
from nybble.train.run import run_training
from nybble.train.step import EagerStep
from tests.adapters.support import load
from tests.train.toy import window

ONE_STEP = [
    "layer 1, forward",
    "layer 2, forward",
    "loss, forward",
    "loss, backward",
    "layer 2, backward",
    "start of the model, backward",
    "update",
]


def phases(page: Path) -> list[str]:
    return re.findall(r"%\"><title>([^:<]*):", page.read_text())


def result(step: int) -> StepResult:
    return StepResult(step, 1.0, 10, 1.0, 1e-3, 0.1, 0, 10)


@pytest.mark.parametrize("activations", ["keep", "recompute"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3"])
def test_a_run_writes_the_page(settings: Callable[..., RunConfig], tmp_path: Path, kind: str, activations: str) -> None:
    page = tmp_path / "new" / "memory.html"
    config = settings(kind, **{"train.max_steps": 3, "memory.activations": activations})
    run_training(config, quiet=True, memory_report=page)
    assert phases(page) == ONE_STEP
    assert "Step 2, " in page.read_text()
    for category in ("frozen weights", "trained weights", "gradients", "moments"):
        assert f"</svg>{category}<" in page.read_text()


def test_of_a_run_of_one_step_that_one_is_shown(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    run_training(settings(**{"train.max_steps": 1}), quiet=True, memory_report=tmp_path / "memory.html")
    assert "Step 1, " in (tmp_path / "memory.html").read_text()


def test_the_run_is_the_same(settings: Callable[..., RunConfig], tmp_path: Path) -> None:
    plain = run_training(settings(**{"output": str(tmp_path / "a")}), quiet=True)
    reported = run_training(
        settings(**{"output": str(tmp_path / "b")}), quiet=True, memory_report=tmp_path / "memory.html"
    )
    assert reported.losses == plain.losses


@pytest.mark.parametrize("activations", ["keep", "keep_matmuls", "keep_on_host", "recompute", "offload"])
@pytest.mark.parametrize("weights", ["resident", "streamed"])
def test_fused_layers_are_followed(tiny: Any, tmp_path: Path, activations: str, weights: str) -> None:
    model = load(tiny("llama"), "nf4")
    inject(model, LoraConfig(r=2))
    body = FusedBody(model, samples_a_row=1, plan=MemoryPlan.uniform(2, activations, weights))
    loss = FusedCausalLMLoss(model, body)
    optimizer = FlatAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    step = EagerStep(loss, optimizer, 1.0)
    report = MemoryReport(step, tmp_path / "memory.html", title="a test", last_step=5)
    for number in (1, 2):
        assert not (tmp_path / "memory.html").exists()
        step.launch(window([(2, 16)], seed=0), seed=0)
        step.read()
        step.finish()
        report.after(result(number))
    found = phases(tmp_path / "memory.html")
    if activations == "offload":  # in halves of layers
        assert found[:4] == [f"part {number}, forward" for number in (1, 2, 3, 4)]
        assert len(found) == len(ONE_STEP) + 4
    else:
        assert found == ONE_STEP
    assert ("streaming slots" in (tmp_path / "memory.html").read_text()) == (weights == "streamed")
    assert isinstance(step.observer, Unobserved)
    assert isinstance(body.observer, Unobserved)


@pytest.mark.parametrize("listed", [True, False])
def test_hooks_on_stock_layers_are_taken_away(tiny: Any, tmp_path: Path, listed: bool) -> None:
    model = load(tiny("llama"))
    inject(model, LoraConfig(r=2))
    if not listed:
        model.base_model.layers = nn.Sequential(*model.base_model.layers)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    step = EagerStep(CausalLMLoss(model), optimizer, 1.0)
    report = MemoryReport(step, tmp_path / "memory.html", title="a test", last_step=1)
    layers = model.base_model.layers
    assert all(bool(layer._forward_hooks) == listed for layer in layers)
    step.launch(window([(2, 16)], seed=0), seed=0)
    step.read()
    step.finish()
    report.after(result(1))
    assert phases(tmp_path / "memory.html")[-1] == "update"
    assert not any(layer._forward_hooks for layer in layers)
