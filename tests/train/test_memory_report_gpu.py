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
from nybble.train.run import RunResult, run_training

pytestmark = pytest.mark.gpu

MIB = 2**20


def on_card(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cuda")


@pytest.mark.usefixtures("own_allocator")
def test_phases_add_up_to_what_was_in_use() -> None:
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


def run_from_scratch(config: RunConfig, page: Path | None = None) -> tuple[RunResult, list[int]]:
    """And its peaks so far after each step. Workspaces that are left from before would be given up within the run."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    result = run_training(config, quiet=True, memory_report=page)
    log = (result.output / "log.jsonl").read_text().splitlines()
    return result, [json.loads(line)["peak_bytes"] for line in log]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_followed_run_is_the_same(settings: Callable[..., RunConfig], tmp_path: Path, method: str) -> None:
    options = {"method": method, "train.max_steps": 6, "train.deterministic": True, "data.packing": True}
    options |= {"model.compute": "bf16", "memory.activations": "keep"}
    plain, peaks = run_from_scratch(settings(**options, output=str(tmp_path / "a")))
    page = tmp_path / "memory.html"
    followed, followed_peaks = run_from_scratch(settings(**options, output=str(tmp_path / "b")), page)
    assert followed.losses == plain.losses
    names = re.findall(r"%\"><title>([^:<]*):", page.read_text())
    assert names[:3] == ["layer 1, forward", "layer 2, forward", "loss, forward"]
    assert names[-1] == "update"
    # Every phase counts a peak of its own: the run must not forget those before, its check among them.
    expected = [*peaks, plain.summary["peak_device_bytes"]]
    assert [*followed_peaks, followed.summary["peak_device_bytes"]] == pytest.approx(expected, rel=0.02)
