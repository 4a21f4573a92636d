"""Whole modules are trained in fp32 and compute in the precision of the model around them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from nybble.adapters.config import LoraConfig
from nybble.adapters.inject import adapter_parameters, disable_adapters, inject
from nybble.adapters.modules_to_save import TrainableCopy
from nybble.models.config import ModelConfig
from nybble.models.load import load_model
from tests.adapters.support import CPU, gradients, load, logits, randomized

Tiny = Callable[..., Path]


@pytest.mark.parametrize("kind", ["smollm", "gpt2"])
@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_they_are_fp32_and_get_gradients(tiny: Tiny, kind: str, storage: str) -> None:
    names = {"smollm": ("norm", "embed_tokens", "lm_head", "o_proj"), "gpt2": ("ln_f", "wpe", "wte", "mlp.c_proj")}
    model = load(tiny(kind), storage)
    before = logits(model)
    inject(model, LoraConfig(r=4, target_modules="attention", modules_to_save=names[kind]))
    assert {parameter.dtype for parameter in adapter_parameters(model).values()} == {torch.float32}
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    found = gradients(randomized(model))
    assert set(found) == set(adapter_parameters(model))
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    with disable_adapters(model):
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
@pytest.mark.parametrize(("kind", "path"), [("llama", "model.norm"), ("gpt2", "transformer.ln_f")])
def test_norms_in_a_bf16_model_round_once(tiny: Tiny, storage: str, kind: str, path: str) -> None:
    model = load_model(ModelConfig(name=str(tiny(kind)), compute="bf16"), device=CPU, storage=storage).model
    copy = TrainableCopy(model.get_submodule(path), LoraConfig())
    weights = {name: value + 0.001 for name, value in copy.module.named_parameters()}
    with torch.no_grad():
        for name, value in copy.module.named_parameters():
            value.copy_(weights[name])
    exact = load(tiny(kind)).get_submodule(path)
    exact.load_state_dict(weights)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    output = copy(x)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, exact(x.float()).bfloat16())


@pytest.mark.parametrize("storage", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize(("kind", "names"), [("gemma2", ("embed_tokens", "norm")), ("gpt2", ("wpe", "wte", "ln_f"))])
def test_a_bf16_model_stays_bf16(tiny: Tiny, storage: str, kind: str, names: tuple[str, ...]) -> None:
    model = load_model(ModelConfig(name=str(tiny(kind)), compute="bf16"), device=CPU, storage=storage).model
    before = logits(model)
    inject(model, LoraConfig(r=4, target_modules="attention", modules_to_save=names))
    seen: dict[str, torch.dtype] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object, output: torch.Tensor) -> None:
            seen[path] = output.dtype

        return hook

    for path, module in model.named_modules():
        if path.endswith(names):
            module.register_forward_hook(note(path))
    after = logits(model)
    assert set(seen.values()) == {torch.bfloat16}
    assert after.dtype == torch.bfloat16
    torch.testing.assert_close(after, before, rtol=0.02, atol=0.05)
