from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nybble.adapters.config import LoraConfig
from nybble.adapters.inject import adapter_config, adapter_parameters, inject
from nybble.adapters.io import adapter_tensors, load_adapter, save_adapter, set_adapter_tensors
from nybble.adapters.provenance import Provenance, base_fingerprint
from nybble.adapters.saved import adapter_folder, check_base, read_adapter
from nybble.errors import UserError
from tests.adapters.support import load, logits, provenance, randomized

Tiny = Callable[..., Path]


@pytest.fixture
def saved(tiny: Tiny, tmp_path: Path) -> Path:
    """A DoRA adapter of the tiny llama, in a run's folder."""
    model = load(tiny("llama"))
    inject(model, LoraConfig(r=4, lora_alpha=10, use_dora=True, rank_pattern={"q_proj": 2}))
    save_adapter(randomized(model), tmp_path / "run/adapter", provenance=provenance(tiny("llama"), "nf4"))
    return tmp_path / "run/adapter"


def edit(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qwen2", {"use_rslora": True, "lora_dropout": 0.1, "alpha_pattern": {"k_proj": 3}}),
        ("gpt2", {"target_modules": "attention", "use_dora": True, "modules_to_save": ("mlp.c_fc", "ln_f")}),
        ("smollm", {"dtype": "bf16", "exclude_modules": ("o_proj",), "modules_to_save": ("embed_tokens",)}),
    ],
)
def test_what_is_saved_is_what_is_loaded(tiny: Tiny, tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    model = load(tiny(kind))
    inject(model, LoraConfig(r=4, lora_alpha=10, **options))
    save_adapter(randomized(model), tmp_path / "adapter", provenance=provenance(tiny(kind)))
    again = load(tiny(kind))
    found = load_adapter(again, tmp_path / "adapter", name="other")
    assert torch.equal(logits(again), logits(model))
    assert not any(parameter.requires_grad for parameter in again.parameters())
    ours, theirs = adapter_config(model), adapter_config(again, "other")
    same = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "alpha_pattern", "exclude_modules", "dtype")
    assert all(getattr(ours, name) == getattr(theirs, name) for name in same)
    assert found.provenance == provenance(tiny(kind))
    assert found.base_model_name == str(tiny(kind))


def test_loaded_adapter_can_go_on_training(tiny: Tiny, saved: Path) -> None:
    model = load(tiny("llama"), "nf4")
    load_adapter(model, saved.parent, trainable=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(adapter_parameters(model))


def test_folder_of_a_run_is_resolved(saved: Path, tiny: Tiny, tmp_path: Path) -> None:
    assert adapter_folder(saved) == adapter_folder(saved.parent) == adapter_folder(str(saved)) == saved
    with pytest.raises(UserError, match="whole model, not an adapter"):
        adapter_folder(tiny("llama"))
    unfinished = tmp_path / "unfinished"
    for step in ("checkpoints/step-000005/adapter", "checkpoints/step-000010/adapter"):
        (unfinished / step).mkdir(parents=True)
    with pytest.raises(UserError, match=r"not finished: .* newest checkpoint, .*/step-000010/adapter"):
        adapter_folder(unfinished)
    (tmp_path / "full" / "model").mkdir(parents=True)
    (tmp_path / "full" / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"give .*/full/model as the model"):
        adapter_folder(tmp_path / "full")
    with pytest.raises(UserError, match="no such folder"):
        adapter_folder(tmp_path / "nothing")


def test_a_failed_save_leaves_what_was_there(tiny: Tiny, saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    model = load(tiny("llama"))
    inject(model, LoraConfig(r=4))
    with pytest.raises(UserError, match="already exists"):
        save_adapter(model, saved, provenance=provenance(tiny("llama")))
    next(iter(adapter_parameters(model).values())).data[0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN or infinite"):
        save_adapter(model, saved, provenance=provenance(tiny("llama")), replace=True)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["adapter"]


def test_replace_and_readers_that_do_not_write(tiny: Tiny, saved: Path, tmp_path: Path) -> None:
    model = load(tiny("llama"))
    inject(model, LoraConfig(r=4, target_modules=("q_proj",)))
    save_adapter(model, saved, provenance=provenance(tiny("llama")), replace=True)
    assert len(read_adapter(saved).pairs) == 2
    save_adapter(model, tmp_path / "other", provenance=provenance(tiny("llama")), write=False)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("suffix", [".weight", ".default", ".default.weight"])
def test_older_names_of_the_magnitude(tiny: Tiny, saved: Path, suffix: str) -> None:
    expected = load(tiny("llama"))
    load_adapter(expected, saved)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("magnitude_vector")]:
            tensors[name + suffix] = tensors.pop(name)

    edit_tensors(saved, rename)
    model = load(tiny("llama"))
    load_adapter(model, saved)
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize(
    "option",
    [
        {"bias": "all"},
        {"lora_bias": True},
        {"layer_replication": [[0, 1]]},
        {"init_lora_weights": "pissa"},
        {"trainable_token_indices": [1]},
        {"use_qalora": True},
        {"an_option_of_the_future": True},
    ],
)
def test_options_that_are_not_honoured_are_refused(saved: Path, option: dict[str, Any]) -> None:
    edit(saved, **option)
    with pytest.raises(UserError, match=rf"{next(iter(option))} = .* is not supported"):
        read_adapter(saved)


def test_options_without_effect_are_passed_over(saved: Path) -> None:
    edit(saved, init_lora_weights="gaussian", loftq_config={"loftq_bits": 4}, peft_version="9", future=None)
    assert read_adapter(saved).config.r == 4


def test_revision_is_of_a_base_on_the_hub(saved: Path, tiny: Tiny) -> None:
    edit(saved, base_model_name_or_path="org/model", revision="v1.0")
    assert read_adapter(saved).revision == "v1.0"
    edit(saved, base_model_name_or_path=None)
    assert read_adapter(saved).revision == "v1.0"
    edit(saved, base_model_name_or_path=str(tiny("llama")))
    assert read_adapter(saved).revision is None


def test_another_revision_is_told_by_its_name(saved: Path) -> None:
    origin = read_adapter(saved).provenance
    assert origin is not None
    origin.model_copy(update={"base": "org/model", "revision": "v1.0"}).write(saved)
    with pytest.raises(UserError, match=r"was trained on org/model at revision v1\.0, whose weights"):
        check_base(read_adapter(saved), "another")


def test_other_kinds_of_adapters_are_refused(saved: Path) -> None:
    edit(saved, peft_type="LOHA")
    with pytest.raises(UserError, match="of type LOHA"):
        read_adapter(saved)


def test_pickles_are_refused(saved: Path) -> None:
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    with pytest.raises(UserError, match="pickle"):
        read_adapter(saved)


def test_truncated_file_is_refused(saved: Path) -> None:
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="corrupt or truncated"):
        read_adapter(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.clear(), "no tensors at all"),
        (lambda tensors: next(iter(tensors.values())).fill_(float("inf")), "infinite"),
        (lambda tensors: tensors.pop(next(name for name in tensors if "lora_B" in name)), "should have"),
        (lambda tensors: tensors.pop(next(name for name in tensors if "magnitude" in name)), "should have"),
        (lambda tensors: tensors.update({"x.lora_embedding_A": torch.ones(2)}), "not supported"),
    ],
)
def test_broken_tensors_are_refused(saved: Path, change: Callable[..., object], message: str) -> None:
    edit_tensors(saved, change)
    with pytest.raises(UserError, match=message):
        read_adapter(saved)


def test_rank_that_is_not_the_files_is_refused(saved: Path) -> None:
    edit(saved, rank_pattern={})
    with pytest.raises(UserError, match=r"has rank 2; .* says 4"):
        read_adapter(saved)


def test_adapter_for_another_base_touches_nothing(tiny: Tiny, saved: Path) -> None:
    for kind in ("gpt2", "qwen3"):
        model = load(tiny(kind))
        names = [name for name, _ in model.named_modules()]
        with pytest.raises(UserError, match=r"(?s)q_proj.*Was it trained on another base\?"):
            load_adapter(model, saved)
        assert [name for name, _ in model.named_modules()] == names


def test_part_of_an_adapter_is_refused(tiny: Tiny, saved: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.1.mlp.up_proj" in name]:
            del tensors[name]

    edit_tensors(saved, drop)
    edit(saved, target_modules=["up_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"])
    with pytest.raises(UserError, match=r"up_proj: named by .*, without tensors"):
        load_adapter(load(tiny("llama")), saved)


def test_fingerprints(tiny: Tiny, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="whose weights are not those of this model"):
        load_adapter(load(tiny("llama")), saved, base_fingerprint="1" * 64)
    load_adapter(load(tiny("llama")), saved, base_fingerprint="0" * 64)
    (saved / "nybble.json").unlink()
    load_adapter(load(tiny("llama")), saved, base_fingerprint="1" * 64)
    # A folder that was quantized stands for the original that it names.
    assert base_fingerprint(tmp_path, "own") == "own"
    Provenance(base="x", base_fingerprint="original", storage="nf4").write(tmp_path)
    assert base_fingerprint(tmp_path, "own") == "original"


def test_tensors_of_another_adapter_are_not_copied(tiny: Tiny) -> None:
    model = load(tiny("llama"))
    inject(model, LoraConfig(r=4, target_modules=("q_proj",)))
    before = adapter_tensors(randomized(model))
    wrong = dict(before)
    first = next(iter(wrong))
    wrong[first] = torch.zeros(1, 1)
    wrong["base_model.model.more.lora_A.weight"] = torch.zeros(1)
    with pytest.raises(UserError, match=r"(?s)no place.*is \(1, 1\), not"):
        set_adapter_tensors(model, wrong)
    assert all(torch.equal(before[name], tensor) for name, tensor in adapter_tensors(model).items())


def test_names_given_by_the_user_are_kept(tiny: Tiny, tmp_path: Path) -> None:
    def written(name: str, **options: Any) -> Any:
        model: nn.Module = load(tiny("llama"))
        inject(model, LoraConfig(r=2, **options))
        save_adapter(model, tmp_path / name, provenance=provenance(tiny("llama")))
        return json.loads((tmp_path / name / "adapter_config.json").read_text())["target_modules"]

    everything = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert written("all") == everything
    assert written("names", target_modules=("v_proj", "mlp.up_proj")) == ["mlp.up_proj", "v_proj"]
    assert written("regex", target_modules=r".*\.(q|k)_proj") == r".*\.(q|k)_proj"
    # This one finds `self_attn` itself too, which PEFT cannot adapt.
    assert written("loose", target_modules=r".*attn.*") == ["k_proj", "o_proj", "q_proj", "v_proj"]
    shutil.rmtree(tmp_path / "all")
