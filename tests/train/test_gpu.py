"""The same runs on a GPU: they learn, in fp16 too, and with train.deterministic they repeat and resume to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nybble.config import RunConfig
from nybble.errors import TrainingStopped
from nybble.train.out_of_memory import explain_out_of_memory
from nybble.train.run import run_training
from tests.train.test_state import HARD, assert_same, cut_off

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_resumed_equals_uninterrupted(settings: Callable[..., RunConfig], tmp_path: Path, method: str) -> None:
    changes = HARD | {"method": method, "train.deterministic": True, "lora.use_dora": False}
    often = {"train.save_every": 3, "train.eval_every": 2, "train.keep_checkpoints": 9}
    straight = run_training(settings("qwen2", **changes, **often), quiet=True)
    cut_off(straight.output, tmp_path / "cut", 3)
    resumed = run_training(settings("qwen2", **changes, **often, output=str(tmp_path / "cut")), resume=True, quiet=True)
    assert_same(straight, resumed)
    assert straight.summary["device"]["type"] == "cuda"
    assert straight.summary["peak_device_bytes"] < 2**30


@pytest.mark.parametrize("compute", ["bf16", "fp16", "fp32"])
def test_loss_falls(settings: Callable[..., RunConfig], compute: str) -> None:
    config = settings(**{"model.compute": compute, "method": "qlora", "train.max_steps": 20, "train.batch_size": 4})
    result = run_training(config, quiet=True)
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert result.summary["skipped_steps"] < 10
    assert result.summary["compute"] == compute


def test_out_of_memory_is_explained(settings: Callable[..., RunConfig]) -> None:
    device = torch.device("cuda", 0)
    explained = pytest.raises(TrainingStopped, match=r"out of memory on cuda \(.* GiB in all")
    with explained, explain_out_of_memory(settings(), device):
        torch.empty(2**50, dtype=torch.uint8, device=device)
