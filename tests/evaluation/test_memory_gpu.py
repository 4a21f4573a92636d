"""A model that is evaluated on a card keeps to the memory settings there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nybble.inference import load_within_plan
from nybble.planner.evaluation import Sequences
from tests.evaluation.test_memory import LARGE, PLACES, config_of, loss_of

pytestmark = pytest.mark.gpu


def test_losses_are_the_same_wherever_weights_lie(tiny: Callable[..., Path], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"Row {number} of some. " * 5}) + "\n" for number in range(9)))
    model = tiny("llama", dtype="bfloat16", **LARGE)
    resident, *away = (loss_of(config_of(model, rows, weights=weights)) for weights in PLACES)
    assert away == pytest.approx([resident] * 2, rel=1e-5)


def test_by_default_all_of_a_small_model_is_on_the_card(tiny: Callable[..., Path]) -> None:
    loaded, held = load_within_plan(config_of(tiny("llama")), work=[Sequences(4, 64)])
    assert held.plan.streamed() == []
    assert {parameter.device.type for parameter in loaded.model.parameters()} == {"cuda"}
