"""A calibration pass on a card, whose hidden states wait in pinned memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.calibrate.test_calibrate import corrected_model, logits, model, prepare, text

pytestmark = pytest.mark.gpu


def test_as_good_as_on_a_cpu(tiny: Callable[..., Path], tmp_path: Path) -> None:
    seen = text(windows=40)
    expected = logits(model(tiny("llama"), "fp32"), seen.windows)
    errors = {}
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        prepare(tiny("llama"), folder, "compensated", text=seen, rank=16, device=torch.device(device))
        for name, prepared in (("base", model(folder)), ("corrected", corrected_model(folder))):
            errors[device, name] = float((logits(prepared, seen.windows) - expected).square().mean())
    for name in ("base", "corrected"):
        assert errors["cuda", name] < 1.2 * errors["cpu", name]
