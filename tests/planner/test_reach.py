"""What an adapter reaches, by the model's sizes, is what injection finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nybble.adapters.config import LoraConfig
from nybble.adapters.inject import inject
from nybble.models.skeleton import replace_modules
from nybble.planner.reach import reach
from nybble.planner.shapes import ModelShape, gpt3
from tests.tiny import random_model

SETTINGS: dict[str, dict[str, Any]] = {
    "all": {},
    "attention": {"target_modules": "attention", "r": 3},
    "names": {"target_modules": ["o_proj", "down_proj"]},
    "expression": {"target_modules": r".*layers\.1\..*(o|down)_proj"},
    "excluded": {"exclude_modules": ["down_proj"]},
    "ranks": {"rank_pattern": {"down_proj": 5, r"layers\.0\.self_attn\.o_proj": 40}},
    "dora": {"use_dora": True},
    "head": {"target_modules": ["lm_head", "o_proj"]},
    "whole": {"modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.mark.parametrize("kind", ["llama", "smollm", "qwen2", "gemma3_text", "phi3"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_parameters_are_counted_as_injected(kind: str, settings: dict[str, Any]) -> None:
    model = random_model(kind)
    replace_modules(model, torch.float32)
    shape = ModelShape.from_config(model.config.to_dict())
    lora = LoraConfig(**settings)
    reached = reach(shape, lora)
    report = inject(model, lora)
    assert reached.parameters == report.parameters.trainable
    named = {path.rpartition(".")[2] for path in report.linears} - {"lm_head"}
    assert set(reached.targets) == named
    assert reached.rank == max(lora.at(path).r for path in report.linears)
    assert reached.ends_trained == ("lm_head" in str(settings))


def test_gpt3_is_adapted_as_the_paper_says() -> None:
    """arXiv 2106.09685, table 4: r = 4 on q and v of 96 layers."""
    reached = reach(gpt3(), LoraConfig(r=4, target_modules=("q_proj", "v_proj")))
    assert reached.parameters == 18_874_368
    assert round(gpt3().parameters / reached.parameters) == 9251
