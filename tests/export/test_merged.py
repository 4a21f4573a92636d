"""Merged folders: Transformers computes from them what the adapter does on its base."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nybble.adapters.config import LoraConfig
from nybble.adapters.inject import inject
from nybble.adapters.io import load_adapter, save_adapter
from nybble.adapters.provenance import Provenance
from nybble.adapters.saved import read_adapter
from nybble.compare.merge_check import describe_merge
from nybble.data.collate import Batch
from nybble.errors import UserError
from nybble.export.measure import ModelOutputs, measure_outputs
from nybble.export.merged import Measure, MergeReport, merge_checkpoint
from nybble.export.quantized import quantize_checkpoint
from nybble.models.checkpoint import Checkpoint
from nybble.models.load import load_tokenizer
from nybble.quant.format import NF4Spec
from nybble.quant.weight import NF4Weight
from tests.adapters.support import CPU, load, load_stock, logits, randomized, tokens
from tests.host_memory import host_peak, needs_glibc

Tiny = Callable[..., Path]


def train(folder: Path, output: Path, storage: str = "fp32", **options: Any) -> nn.Module:
    """A model with an adapter of random numbers, which is saved to `output` as if it had been trained."""
    model = load(folder, storage)
    inject(model, LoraConfig(**({"r": 4, "lora_alpha": 10} | options)))
    randomized(model)
    checkpoint = Checkpoint.open(str(folder))
    nf4 = {"block_size": 64, "double_quant": True} if storage == "nf4" else {}
    where = Provenance(base=str(folder), base_fingerprint=checkpoint.fingerprint, storage=storage, **nf4)
    save_adapter(model, output, provenance=where)
    return model


def merge(folder: Path, adapter: Path, output: Path, **options: Any) -> MergeReport:
    return merge_checkpoint(Checkpoint.open(str(folder)), read_adapter(adapter), output, **options)


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=3e-5)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped heads": ("llama", {}),
    "biases": ("qwen2", {"use_rslora": True}),
    "conv1d": ("gpt2", {"target_modules": "attention"}),
    "conv1d dora": ("gpt2", {"use_dora": True}),
    "conv1d whole, tied": ("gpt2", {"target_modules": ("c_attn",), "modules_to_save": ("mlp.c_fc", "ln_f", "wte")}),
    "fused": ("phi3", {}),
    "dora": ("qwen3", {"use_dora": True}),
    "norms that add one": ("gemma3_text", {"modules_to_save": ("norm", "input_layernorm")}),
    "embedding scaled, tied": ("gemma2", {"modules_to_save": ("embed_tokens",)}),
    "patterns": (
        "llama",
        {"rank_pattern": {"k_proj": 2, "layers.0.mlp.down_proj": 6}, "alpha_pattern": {"up_proj": 3}},
    ),
    "tied, head adapted": ("smollm", {"target_modules": ("lm_head", "q_proj")}),
    "tied, embedding trained": ("smollm", {"modules_to_save": ("embed_tokens",)}),
    "tied, head trained": ("smollm", {"modules_to_save": ("lm_head",)}),
    "tied, head adapted, embedding trained": (
        "smollm",
        {"target_modules": ("lm_head",), "modules_to_save": ("embed_tokens",), "use_dora": True},
    ),
    "experts": ("mixtral", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_merged_logits_are_the_adapters(tiny: Tiny, tmp_path: Path, case: str) -> None:
    kind, options = CASES[case]
    folder = tiny(kind, sharded=True)
    model = train(folder, tmp_path / "adapter", **options)
    report = merge(folder, tmp_path / "adapter", tmp_path / "merged")
    assert (logits(model) - logits(load_stock(folder))).abs().max() > 0.05
    assert_same(logits(load_stock(tmp_path / "merged")), logits(model))
    assert_same(logits(load(tmp_path / "merged")), logits(model))
    before, after = weights(folder), weights(tmp_path / "merged")
    assert before.keys() <= after.keys()
    assert report.untied == ("tied" in case)
    added = {"lm_head.weight"} if report.untied else set()
    assert after.keys() - before.keys() == added
    assert report.tensors_changed >= len(read_adapter(tmp_path / "adapter").pairs)


def test_untied_model_says_so(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny("smollm"), tmp_path / "adapter", target_modules=("lm_head",))
    merge(tiny("smollm"), tmp_path / "adapter", tmp_path / "merged")
    after = weights(tmp_path / "merged")
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(after["model.embed_tokens.weight"], weights(tiny("smollm"))["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])


def test_a_checkpoint_without_the_models_prefix(tiny: Tiny, tmp_path: Path) -> None:
    """GPT-2's own files call `transformer.h.0` plainly `h.0`, and the head is tied."""
    folder = tmp_path / "gpt2"
    folder.mkdir()
    for path in tiny("gpt2").iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    bare = {name.removeprefix("transformer."): value for name, value in weights(tiny("gpt2")).items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    model = train(folder, tmp_path / "adapter", target_modules=("lm_head", "c_attn"))
    merge(folder, tmp_path / "adapter", tmp_path / "merged")
    assert weights(tmp_path / "merged").keys() == {*bare, "lm_head.weight"}
    assert_same(logits(load_stock(tmp_path / "merged")), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_rounded_once(tiny: Tiny, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = tiny("llama", dtype=str(dtype).removeprefix("torch."))
    train(folder, tmp_path / "adapter", use_dora=True)
    report = merge(folder, tmp_path / "adapter", tmp_path / "merged")
    before, after = weights(folder), weights(tmp_path / "merged")
    for path, pair in read_adapter(tmp_path / "adapter").pairs.items():
        base = before[f"{path}.weight"].double() + pair.scaling * pair.B.double() @ pair.A.double()
        exact = base * (pair.magnitude.double() / base.norm(dim=1)).unsqueeze(1)
        found = after[f"{path}.weight"]
        assert found.dtype == dtype
        # Half an ulp, and the rounding of the fp32 in between.
        assert ((found.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * 1.001 * exact.abs() + 1e-7).all()
    assert report.dtype == {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    assert report.stats.touched > report.stats.swallowed


def test_plain_merge_is_bit_equal_to_its_definition(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("qwen2", dtype="bfloat16")
    train(folder, tmp_path / "adapter")
    merge(folder, tmp_path / "adapter", tmp_path / "merged")
    before, after = weights(folder), weights(tmp_path / "merged")
    pairs = read_adapter(tmp_path / "adapter").pairs
    for name, tensor in before.items():
        if (pair := pairs.get(name.removesuffix(".weight"))) is not None:
            tensor = (tensor.float() + pair.scaling * (pair.B.float() @ pair.A.float())).to(tensor.dtype)
        assert torch.equal(after[name], tensor)


def test_another_dtype(tiny: Tiny, tmp_path: Path) -> None:
    model = train(tiny("llama", dtype="bfloat16"), tmp_path / "adapter")
    merge(tiny("llama", dtype="bfloat16"), tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32)
    assert {value.dtype for value in weights(tmp_path / "merged").values()} == {torch.float32}
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "float32"
    assert_same(logits(load_stock(tmp_path / "merged")), logits(model))


def test_dequantized_base_is_what_the_adapter_saw(tiny: Tiny, tmp_path: Path) -> None:
    for kind in ("gpt2", "smollm"):
        model = train(tiny(kind), tmp_path / kind, "nf4")
        report = merge(tiny(kind), tmp_path / kind, tmp_path / f"{kind}-merged")
        assert report.base == "dequantized"
        assert "NF4" in report.reason
        assert_same(logits(load_stock(tmp_path / f"{kind}-merged")), logits(model))


def test_dequantized_weights_without_an_adapter_are_dequantized_too(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("qwen2", dtype="bfloat16")
    train(folder, tmp_path / "adapter", "nf4", target_modules=("q_proj",))
    merge(folder, tmp_path / "adapter", tmp_path / "merged")
    before, after = weights(folder), weights(tmp_path / "merged")
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(after[name], NF4Weight.quantize(before[name], NF4Spec()).dequantize(torch.bfloat16))
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_4bit_checkpoint_as_the_base(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    quantized = tmp_path / "nf4"
    quantize_checkpoint(Checkpoint.open(str(tiny(kind))), quantized, NF4Spec(), device=CPU)
    model = train(tiny(kind), tmp_path / "adapter", "nf4")
    report = merge(quantized, tmp_path / "adapter", tmp_path / "merged")
    assert report.base == "dequantized"
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert "quantization_config" not in config
    assert not (tmp_path / "merged/nybble.json").exists()
    assert_same(logits(load_stock(tmp_path / "merged")), logits(model))
    with pytest.raises(UserError, match="is in 4 bit: it does not have the original weights"):
        merge(quantized, tmp_path / "adapter", tmp_path / "other", base="original")


def test_original_base_when_asked(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny("llama"), tmp_path / "adapter", "nf4")
    assert merge(tiny("llama"), tmp_path / "adapter", tmp_path / "merged", base="original").reason == "asked for"
    model = load(tiny("llama"))
    load_adapter(model, tmp_path / "adapter")
    assert_same(logits(load_stock(tmp_path / "merged")), logits(model))


def batches() -> Iterator[Batch]:
    ids = tokens(4)
    labels = ids.clone()
    labels[:, 0] = -100
    yield Batch(ids, labels, torch.arange(12).repeat(2, 1), 22)


def test_measuring_leaves_each_module_in_its_mode(tiny: Tiny) -> None:
    model = load_stock(tiny("llama")).train()
    model.model.layers[0].eval()
    before = {path: module.training for path, module in model.named_modules()}
    measure_outputs(model, batches())
    assert {path: module.training for path, module in model.named_modules()} == before


def test_a_base_whose_loss_is_no_number_is_not_the_better_one(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("qwen2", dtype="bfloat16")
    reference = measure_outputs(train(folder, tmp_path / "adapter", "nf4"), batches())

    def outputs(merged: Path) -> ModelOutputs:
        return replace(reference, loss=math.nan if merged.name == "dequantized" else 2.0)

    report = merge(folder, tmp_path / "adapter", tmp_path / "merged", measure=Measure(outputs, reference))
    assert report.base == "original"
    assert "dequantized nan, original 2.0000" in report.reason


def test_measured_base_is_the_better_one(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("qwen2", dtype="bfloat16")
    adapted = train(folder, tmp_path / "adapter", "nf4")
    reference = measure_outputs(adapted, batches())
    measure = Measure(lambda merged: measure_outputs(load_stock(merged), batches()), reference)
    report = merge(folder, tmp_path / "adapter", tmp_path / "merged", measure=measure)
    assert report.measured.keys() == {"original", "dequantized"}
    losses = {base: found.merged_loss for base, found in report.measured.items()}
    assert report.base == min(losses, key=losses.__getitem__)
    # The dequantized base is what the adapter ran on, so only bf16 rounding is between them.
    gaps = {base: found.largest_logit_gap for base, found in report.measured.items()}
    assert gaps["dequantized"] < gaps["original"] / 3
    assert losses["dequantized"] == pytest.approx(reference.loss, abs=0.05)
    assert measure_outputs(load_stock(tmp_path / "merged"), batches()).loss == losses[report.base]
    record = json.loads((tmp_path / "merged/merge.json").read_text())
    assert record["measured"][report.base]["merged_loss"] == losses[report.base]
    assert record["fingerprint"] == Checkpoint.open(str(folder)).fingerprint
    assert sorted(path.name for path in (tmp_path / "merged").iterdir() if path.is_dir()) == []


def test_worse_original_is_not_taken(tiny: Tiny, tmp_path: Path) -> None:
    """The choice follows the measurement, whichever way it falls."""
    train(tiny("llama"), tmp_path / "adapter", "nf4")
    outputs = measure_outputs(load_stock(tiny("llama")), batches())
    for better in ("original", "dequantized"):
        measure = Measure(lambda folder, better=better: replace(outputs, loss=float(folder.name != better)), outputs)
        report = merge(tiny("llama"), tmp_path / "adapter", tmp_path / better, measure=measure)
        assert report.base == better
        assert "lower held-out loss" in report.reason


def test_tokenizer_of_the_adapter_wins(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("llama")
    tokenizer = load_tokenizer(Checkpoint.open(str(folder)))
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    model = load(folder)
    inject(model, LoraConfig(r=2))
    randomized(model)
    where = Provenance(base="x", base_fingerprint=Checkpoint.open(str(folder)).fingerprint, storage="fp32")
    save_adapter(model, tmp_path / "adapter", provenance=where, tokenizer=tokenizer)
    merge(folder, tmp_path / "adapter", tmp_path / "merged")
    merged = load_tokenizer(Checkpoint.open(str(tmp_path / "merged")))
    assert merged.chat_template == tokenizer.chat_template
    assert (tmp_path / "merged/generation_config.json").exists()


def test_swallowed_changes_are_counted(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny("llama", dtype="bfloat16")
    train(folder, tmp_path / "adapter", lora_alpha=0.02)
    report = merge(folder, tmp_path / "adapter", tmp_path / "merged")
    assert 0.3 < report.stats.swallowed_share < 1
    record = json.loads((tmp_path / "merged/merge.json").read_text())
    assert record["swallowed_share"] == report.stats.swallowed_share
    assert record["largest_delta"] > 0


@pytest.mark.parametrize(("alpha", "message"), [(1e-9, "rounding swallowed every change"), (None, "does nothing")])
def test_merge_that_changes_nothing_is_an_error(tiny: Tiny, tmp_path: Path, alpha: float | None, message: str) -> None:
    folder = tiny("llama", dtype="bfloat16")
    if alpha is not None:
        train(folder, tmp_path / "adapter", lora_alpha=alpha)
    else:
        model = load(folder)
        inject(model, LoraConfig(r=2))
        where = Provenance(base="x", base_fingerprint=Checkpoint.open(str(folder)).fingerprint, storage="bf16")
        save_adapter(model, tmp_path / "adapter", provenance=where)
    with pytest.raises(UserError, match=message):
        merge(folder, tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_adapter_of_another_model(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny("qwen2"), tmp_path / "adapter")
    adapter = replace(read_adapter(tmp_path / "adapter"), provenance=None)
    with pytest.raises(UserError, match=r"(?s)do not fit.*q_proj.*another base") as caught:
        merge_checkpoint(Checkpoint.open(str(tiny("gpt2"))), adapter, tmp_path / "merged")
    assert "transformer" not in str(caught.value)
    with pytest.raises(UserError, match="whose weights are not those of this model"):
        merge(tiny("qwen2", seed=1), tmp_path / "adapter", tmp_path / "merged")


def test_output_that_exists_is_left_alone(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny("llama"), tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/mine").touch()
    with pytest.raises(UserError, match="already exists"):
        merge(tiny("llama"), tmp_path / "adapter", tmp_path / "merged")
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["mine"]


def test_dequantized_base_needs_an_adapter_of_nf4(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny("llama"), tmp_path / "adapter")
    with pytest.raises(UserError, match="belongs to the base in fp32"):
        merge(tiny("llama"), tmp_path / "adapter", tmp_path / "merged", base="dequantized")


BLOCK_CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "stored": ("llama", "fp32", {"use_dora": True}),
    "quantized": ("llama", "nf4", {}),
    "conv1d, quantized": ("gpt2", "nf4", {}),
    "tied, head adapted": ("smollm", "fp32", {"target_modules": ("lm_head", "q_proj")}),
    "embedding trained": ("llama", "nf4", {"modules_to_save": ("embed_tokens",)}),
    "experts": ("mixtral", "fp32", {}),
}


@pytest.mark.parametrize("case", BLOCK_CASES)
def test_blocks_of_rows_make_the_same_folder(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    kind, storage, options = BLOCK_CASES[case]
    folder = tiny(kind, dtype="bfloat16")
    train(folder, tmp_path / "adapter", storage, r=1, **options)  # a product of one term has one order
    expected = merge(folder, tmp_path / "adapter", tmp_path / "whole")
    monkeypatch.setattr("nybble.models.tensorfile.BLOCK_BYTES", 2**13)
    monkeypatch.setattr("nybble.adapters.merge._BLOCK_VALUES", 2**10)
    found = merge(folder, tmp_path / "adapter", tmp_path / "blocks")
    before, after = weights(tmp_path / "whole"), weights(tmp_path / "blocks")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert (found.stats, found.tensors_changed) == (expected.stats, expected.tensors_changed)


def test_blocks_of_a_4bit_checkpoint(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize_checkpoint(Checkpoint.open(str(tiny("llama"))), tmp_path / "nf4", NF4Spec(), device=CPU)
    train(tiny("llama"), tmp_path / "adapter", "nf4", r=1)
    merge(tmp_path / "nf4", tmp_path / "adapter", tmp_path / "whole")
    monkeypatch.setattr("nybble.adapters.merge._BLOCK_VALUES", 2**10)
    merge(tmp_path / "nf4", tmp_path / "adapter", tmp_path / "blocks")
    before, after = weights(tmp_path / "whole"), weights(tmp_path / "blocks")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@needs_glibc
@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_no_large_tensor_is_held_whole(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    folder = tiny("llama", hidden_size=1024, intermediate_size=16 * 1024, num_hidden_layers=1)  # of 64 MiB
    train(folder, tmp_path / "adapter", "nf4")
    monkeypatch.setattr("nybble.models.tensorfile.BLOCK_BYTES", 2**22)
    monkeypatch.setattr("nybble.adapters.merge._BLOCK_VALUES", 2**18)
    monkeypatch.setattr("nybble.ops.nf4._CHUNK_VALUES", 2**18)
    with host_peak() as measured:
        merge(folder, tmp_path / "adapter", tmp_path / "merged", base=base)
    codes = 9 * 2**20 if base == "dequantized" else 0  # and their scales, of the one weight in work
    assert measured.peak_bytes < codes + 24 * 2**20


def test_finished_files_may_be_taken_away(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny("llama"), tmp_path / "adapter")
    merge(tiny("llama"), tmp_path / "adapter", tmp_path / "kept", max_shard_bytes=100_000)
    taken: dict[str, Tensor] = {}

    def take(file: Path) -> None:
        taken.update(load_file(file))
        file.unlink()

    merge(tiny("llama"), tmp_path / "adapter", tmp_path / "taken", max_shard_bytes=100_000, on_file=take)
    expected = weights(tmp_path / "kept")
    assert taken.keys() == expected.keys()
    assert all(torch.equal(taken[name], tensor) for name, tensor in expected.items())
    assert not list((tmp_path / "taken").glob("*.safetensors"))
    assert (tmp_path / "taken/merge.json").exists()


def test_values_beyond_fp16(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny("llama"), tmp_path / "adapter", lora_alpha=1e7)
    with pytest.raises(UserError, match="beyond the range"):
        merge(tiny("llama"), tmp_path / "adapter", tmp_path / "merged", dtype=torch.float16)


@pytest.mark.parametrize("lost", [True, False])
def test_changes_that_rounding_takes_back_are_told(tiny: Tiny, tmp_path: Path, lost: bool) -> None:
    train(tiny("llama"), tmp_path / "adapter")
    report = merge(tiny("llama"), tmp_path / "adapter", tmp_path / "merged")
    stats = replace(report.stats, swallowed=report.stats.touched * 3 // 4 if lost else 0)
    lines = describe_merge(replace(report, stats=stats))
    assert any("note: 75% of the weights" in line and "--dtype fp32" in line for line in lines) == lost
