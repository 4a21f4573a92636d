"""Adapters go both ways between nybble and PEFT: the same logits, the same gradients."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nybble.adapters.config import LoraConfig
from nybble.adapters.inject import inject
from nybble.adapters.io import load_adapter, save_adapter
from nybble.adapters.lora import LoRALinear
from tests.adapters.support import gradients, load, load_peft, load_stock, logits, provenance, randomize, randomized

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore::UserWarning:bitsandbytes.*"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*", "ignore:.*tie_word_embeddings.*"),
]

Tiny = Callable[..., Path]

KINDS = ["llama", "qwen2", "gpt2", "phi3", "smollm"]

CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "target_modules": "attention"},
    "dora": {"use_dora": True},
    "head": {"target_modules": ("lm_head",)},
    "bf16": {"dtype": "bf16"},
}


def config(**options: Any) -> LoraConfig:
    return LoraConfig(**({"r": 4, "lora_alpha": 10} | options))


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    # fp32 sums in another order: a few ulps of the largest logit.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_computes_what_our_adapter_does(tiny: Tiny, tmp_path: Path, kind: str, case: str) -> None:
    model = load(tiny(kind))
    inject(model, config(**CASES[case]))
    randomized(model)
    save_adapter(model, tmp_path / "adapter", provenance=provenance(tiny(kind)))
    base = logits(load_stock(tiny(kind)))
    theirs = logits(load_peft(tiny(kind), tmp_path / "adapter"))
    assert (theirs - base).abs().max() > 0.05
    assert_same(logits(model), theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["lora", "dora", "dora_dropout"])
def test_gradients_are_pefts(tiny: Tiny, tmp_path: Path, kind: str, case: str) -> None:
    options = {"lora": {}, "dora": {"use_dora": True}, "dora_dropout": {"use_dora": True, "lora_dropout": 0.3}}[case]
    model = load(tiny(kind))
    inject(model, config(**options))
    randomized(model)
    save_adapter(model, tmp_path / "adapter", provenance=provenance(tiny(kind)))
    theirs = load_peft(tiny(kind), tmp_path / "adapter", trainable=True)
    for each in (model, theirs):
        each.eval()
        for module in each.modules():
            if isinstance(module, nn.Dropout) and module.p == 0.3:
                module.train()
            # Dropout in the adapters only: PEFT and we ask the layer itself whether it trains.
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.training = True
            if isinstance(module, LoRALinear):
                for adapter in module.adapters.values():
                    adapter.training = True
    torch.manual_seed(5)
    ours = {_peft_name(name): gradient for name, gradient in gradients(model).items()}
    torch.manual_seed(5)
    expected = gradients(theirs)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 1e-7)


def _peft_name(name: str) -> str:
    parts = {"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight"}
    parts["magnitude"] = "lora_magnitude_vector.default.weight"
    path, part = re.fullmatch(r"(.+)\.adapters\.default\.(\w+)", name).groups()
    return f"base_model.model.{path}.{parts[part]}"


PEFT_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all-linear": ("qwen2", {"target_modules": "all-linear"}),
    "names": ("llama", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "regex": ("llama", {"target_modules": r".*layers\.1\..*(q_proj|up_proj)"}),
    "dora": ("qwen2", {"target_modules": "all-linear", "use_dora": True}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
    "conv1d dora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "fused": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {"k_proj": 2, r".*\.1\.mlp\.down_proj": 6},
            "alpha_pattern": {"layers.0.self_attn.q_proj": 3},
            "use_rslora": True,
        },
    ),
    "excluded": ("llama", {"target_modules": "all-linear", "exclude_modules": ["layers.0.mlp.up_proj", "o_proj"]}),
    "layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "whole": (
        "smollm",
        {"target_modules": ["q_proj"], "modules_to_save": ["norm", "embed_tokens", "lm_head", "o_proj"]},
    ),
    "whole biased": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["ln_f", "wpe", "mlp.c_proj"]}),
    "head": ("smollm", {"target_modules": ["lm_head", "up_proj"]}),
}


@pytest.mark.parametrize("case", PEFT_CASES)
def test_we_compute_what_pefts_adapter_does(tiny: Tiny, tmp_path: Path, case: str) -> None:
    kind, options = PEFT_CASES[case]
    settings = peft.LoraConfig(r=4, lora_alpha=10, task_type="CAUSAL_LM", **options)
    theirs = peft.get_peft_model(load_stock(tiny(kind)), settings).eval()
    randomize({name: value for name, value in theirs.named_parameters() if value.requires_grad})
    theirs.save_pretrained(tmp_path / "adapter")
    base = logits(load_stock(tiny(kind)))

    model = load(tiny(kind))
    load_adapter(model, tmp_path / "adapter")
    assert (logits(theirs) - base).abs().max() > 0.05
    assert_same(logits(model), logits(theirs))

    save_adapter(model, tmp_path / "again", provenance=provenance(tiny(kind)))
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    # PEFT adds the base's own weight of a head that it adapts.
    assert {name for name in before if ".base_layer." not in name} == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert_same(logits(load_peft(tiny(kind), tmp_path / "again")), logits(theirs))


def test_modules_trained_whole_reach_peft(tiny: Tiny, tmp_path: Path) -> None:
    """`norm` is one module here and every norm to PEFT: the folder must say the one."""
    model = load(tiny("smollm"))
    inject(model, config(target_modules=("v_proj",), modules_to_save=("norm", "embed_tokens")))
    randomized(model)
    save_adapter(model, tmp_path / "adapter", provenance=provenance(tiny("smollm")))
    saved = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert saved["modules_to_save"] == ["embed_tokens", "model.norm"]
    assert_same(logits(model), logits(load_peft(tiny("smollm"), tmp_path / "adapter")))


def test_config_names_are_pefts(tiny: Tiny, tmp_path: Path) -> None:
    model = load(tiny("gpt2"))
    inject(model, config(target_modules="attention", lora_alpha=7.5))
    save_adapter(model, tmp_path / "adapter", provenance=provenance(tiny("gpt2")))
    written = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert written.keys() <= set(peft.LoraConfig.__dataclass_fields__)
    assert written["target_modules"] == ["attn.c_proj", "c_attn"]
    assert written["fan_in_fan_out"] is True
    assert written["lora_alpha"] == 7.5


@pytest.mark.parametrize("left_out", ["missing", "null"])
def test_what_a_file_leaves_out_is_as_peft_has_it(tiny: Tiny, tmp_path: Path, left_out: str) -> None:
    model, folder = load(tiny("llama")), tmp_path / "adapter"
    inject(model, config(r=8, lora_alpha=32))
    save_adapter(randomized(model), folder, provenance=provenance(tiny("llama")))
    file = folder / "adapter_config.json"
    defaults = peft.LoraConfig()
    names = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
    kept = {name: value for name, value in json.loads(file.read_text()).items() if name not in names}
    file.write_text(json.dumps(kept))
    theirs = logits(load_peft(tiny("llama"), folder))
    file.write_text(json.dumps(kept | (dict.fromkeys(names) if left_out == "null" else {})))
    again = load(tiny("llama"))
    found = load_adapter(again, folder).config
    assert {name: getattr(found, name) for name in names} == {name: getattr(defaults, name) for name in names}
    assert_same(logits(again), theirs)
    assert (logits(again) - logits(model)).abs().max() > 0.05


def test_pefts_own_config_fields_are_all_known() -> None:
    """A field that a new PEFT release adds is refused when it is set; this says which ones are new."""
    from nybble.adapters import peft_format

    known = {*peft_format._SHARED, *peft_format._NEUTRAL, *peft_format._WITHOUT_EFFECT}
    assert set(peft.LoraConfig.__dataclass_fields__) - known == set()
