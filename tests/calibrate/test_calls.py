"""How layers are called, and what comes behind them, of models that take what a layer gives in either way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.calibrate.calls import behind_layers, record_calls
from nybble.calibrate.head import logits_of
from nybble.models.skeleton import decoder_layers

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
    "falcon": {"num_hidden_layers": 2, "num_attention_heads": 4},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
}


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_layers_one_by_one_are_the_model(kind: str) -> None:
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **MODELS[kind], **ends)).eval()
    windows = torch.randint(0, 64, (2, 10), generator=torch.Generator().manual_seed(0))
    calls, hidden = record_calls(model, windows)
    for window, state in zip(windows, hidden, strict=True):
        for layer, call in zip(decoder_layers(model).values(), calls, strict=True):
            state = call(layer, state)
        with behind_layers(model, 1, 10) as go_on:
            last = go_on(state)
        expected = model(window[None])
        torch.testing.assert_close(logits_of(model)(last), expected.logits, rtol=1e-4, atol=1e-5)
