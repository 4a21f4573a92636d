"""The ledger of a card: its phases add up to what the card had in use, and following a step does not change it."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nybble.config import RunConfig
from nybble.memory.ledger import Ledger
from nybble.train.run import run_training

pytestmark = pytest.mark.gpu

MIB = 2**20


def on_card(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cuda")


def test_phases_add_up_to_what_was_in_use() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    device = torch.device("cuda")
    weights = on_card(64 * MIB)
    ledger = Ledger(lambda: {"weights": [weights[: 32 * MIB], weights]}, device)
    ledger.begin()
    kept = on_card(32 * MIB)
    on_card(128 * MIB)
    ledger.mark("forward")
    free, total = torch.cuda.mem_get_info()
    used = total - free
    del kept
    ledger.mark("backward")
    forward, backward = ledger.phases
    assert (forward.held["weights"], forward.held["activations"]) == (64 * MIB, 32 * MIB)
    assert forward.held["temporary"] == 128 * MIB
    assert forward.total == used  # nothing was given back to the card
    assert backward.held["activations"] == 32 * MIB
    assert backward.held["temporary"] == 0
    assert backward.total == used


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_followed_run_is_the_same(settings: Callable[..., RunConfig], tmp_path: Path, method: str) -> None:
    options = {"method": method, "train.max_steps": 6, "train.deterministic": True, "data.packing": True}
    options |= {"model.compute": "bf16", "memory.activations": "keep"}
    plain = run_training(settings(**options, output=str(tmp_path / "a")), quiet=True)
    page = tmp_path / "memory.html"
    followed = run_training(settings(**options, output=str(tmp_path / "b")), quiet=True, memory_report=page)
    assert followed.losses == plain.losses
    names = re.findall(r"%\"><title>([^:<]*):", page.read_text())
    assert names[:3] == ["layer 1, forward", "layer 2, forward", "loss, forward"]
    assert names[-1] == "update"
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("a", "b")]
    # Peaks are counted anew by every phase: the run must not forget those before.
    assert records[1]["peak_device_bytes"] >= 0.98 * records[0]["peak_device_bytes"]
