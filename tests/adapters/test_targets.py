from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nybble.adapters.config import LoraConfig
from nybble.adapters.targets import find_targets, shortest_names
from nybble.errors import UserError
from tests.adapters.support import load

Tiny = Callable[..., Path]

ATTENTION = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "phi3": {"qkv_proj", "o_proj"},
    "gpt2": {"c_attn", "attn.c_proj"},
    "qwen3_moe": {"q_proj", "k_proj", "v_proj", "o_proj"},
}


def ends(paths: tuple[str, ...]) -> set[str]:
    return {".".join(path.split(".")[-2:]) if path.endswith("c_proj") else path.split(".")[-1] for path in paths}


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_by_the_models_own_names(tiny: Tiny, kind: str) -> None:
    targets = find_targets(load(tiny(kind)), LoraConfig(target_modules="attention"))
    assert ends(targets.linears) == ATTENTION[kind]
    assert len(targets.linears) == 2 * len(ATTENTION[kind])


def test_all_linear_leaves_the_head_out(tiny: Tiny) -> None:
    model = load(tiny("llama"))
    targets = find_targets(model, LoraConfig())
    assert len(targets.linears) == 14
    assert "lm_head" not in targets.linears
    assert find_targets(model, LoraConfig(target_modules=("lm_head",))).linears == ("lm_head",)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ("q_proj", "mlp.up_proj")}, {"0.q", "1.q", "0.up", "1.up"}),
        ({"target_modules": r".*\.1\..*(up|q)_proj"}, {"1.q", "1.up"}),
        ({"target_modules": ("q_proj", "o_proj"), "exclude_modules": ("0.self_attn.q_proj",)}, {"1.q", "1.o", "0.o"}),
        ({"target_modules": ("q_proj", "up_proj"), "exclude_modules": r".*layers\.1.*"}, {"0.q", "0.up"}),
        ({"target_modules": ("q_proj", "up_proj"), "modules_to_save": ("q_proj",)}, {"0.up", "1.up"}),
    ],
)  # fmt: skip
def test_matching(tiny: Tiny, options: dict[str, Any], expected: set[str]) -> None:
    linears = find_targets(load(tiny("llama")), LoraConfig(**options)).linears
    assert {f"{path.split('.')[2]}.{path.split('.')[-1].removesuffix('_proj')}" for path in linears} == expected


def test_a_name_matches_from_a_dot_on(tiny: Tiny) -> None:
    """`proj` is the end of every name, and the name of no module; `norm` is not `input_layernorm`."""
    model = load(tiny("llama"))
    with pytest.raises(UserError, match="'proj' matches nothing"):
        find_targets(model, LoraConfig(target_modules=("proj",)))
    assert find_targets(model, LoraConfig(modules_to_save=("norm",))).whole == ("model.norm",)


def test_everything_unmatched_is_listed_at_once(tiny: Tiny) -> None:
    config = LoraConfig(
        target_modules=("q_porj", "v_proj", "norm", "mlp"),
        exclude_modules=("k_prj",),
        rank_pattern={"o_proj": 2, "v_proj": 4},
        alpha_pattern={"vproj": 3},
        modules_to_save=("embed_token", "mlp"),
    )
    with pytest.raises(UserError) as caught:
        find_targets(load(tiny("llama")), config)
    message = str(caught.value)
    for expected in (
        "target_modules: 'q_porj' matches nothing; did you mean 'q_proj'",
        "target_modules: 'norm' is a LlamaRMSNorm, not a linear layer",
        "target_modules: 'mlp' is a LlamaMLP, not a linear layer",
        "exclude_modules: 'k_prj' matches nothing; did you mean 'k_proj'",
        "modules_to_save: 'embed_token' matches nothing; did you mean 'embed_tokens'",
        "modules_to_save: 'mlp' is a LlamaMLP made of others",
        "rank_pattern: 'o_proj' matches no layer that is adapted",
        "alpha_pattern: 'vproj' matches no layer that is adapted",
        "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj",
    ):
        assert expected in message
    assert "'v_proj' matches" not in message


def test_a_single_name_is_taken_for_an_expression_and_explained(tiny: Tiny) -> None:
    with pytest.raises(
        UserError, match=r"'q_proj' matches no whole path .*names are given as a list: \[q_proj, v_proj\]"
    ):
        find_targets(load(tiny("llama")), LoraConfig(target_modules="q_proj"))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ("q_proj",), "exclude_modules": ("q_proj",)},
        {"target_modules": ("lm_head",), "modules_to_save": ("lm_head",)},
        {"target_modules": ("q_proj",), "exclude_modules": ("q_proj",), "modules_to_save": ("norm",)},
        {"target_modules": ("q_proj",), "modules_to_save": ("q_proj",), "rank_pattern": {"q_proj": 2}},
    ],
)
def test_an_adapter_without_a_low_rank_pair_is_refused(tiny: Tiny, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="leaves no linear layer for a low-rank pair"):
        find_targets(load(tiny("llama")), LoraConfig(**options))


def test_broken_expressions_are_named() -> None:
    with pytest.raises(ValueError, match=r"'\(q' is not a regular expression"):
        LoraConfig(target_modules="(q")
    with pytest.raises(ValueError, match="above 0"):
        LoraConfig(rank_pattern={"q_proj": 0})


def test_patterns_give_a_layer_its_own_rank_and_scaling() -> None:
    config = LoraConfig(
        r=8, lora_alpha=16, rank_pattern={"q_proj": 2, r"layers\.1\..*": 4}, alpha_pattern={"mlp.up_proj": 5}
    )
    assert config.at("model.layers.1.self_attn.q_proj").scaling == 16 / 2  # the first pattern that matches
    assert config.at("model.layers.1.mlp.up_proj").scaling == 5 / 4
    assert config.at("model.layers.0.mlp.down_proj").scaling == 16 / 8
    assert config.model_copy(update={"use_rslora": True}).at("x.q_proj").scaling == 16 / 2**0.5


def test_shortest_names_say_the_chosen_and_no_other() -> None:
    paths = ["h.0.attn", "h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.attn.c_proj", "h.1.mlp.c_proj", "h.0.mlp.c_fc"]
    assert shortest_names(["h.0.attn.c_proj", "h.1.attn.c_proj"], paths) == ("attn.c_proj",)
    assert shortest_names(["h.1.mlp.c_proj", "h.0.mlp.c_fc"], paths) == ("1.mlp.c_proj", "c_fc")
    assert shortest_names(["norm"], ["norm", "a.norm"]) == ("norm",)
    assert shortest_names(["m.norm"], ["m.norm", "m.layernorm"], boundary="") == ("m.norm",)
