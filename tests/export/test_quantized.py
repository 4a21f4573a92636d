"""4-bit folders: what we write loads in Transformers with bitsandbytes, what they write loads here, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from nybble.adapters.provenance import Provenance
from nybble.errors import UserError
from nybble.export.quantized import QuantizeReport, quantize_checkpoint
from nybble.models.checkpoint import Checkpoint
from nybble.models.config import ModelConfig
from nybble.models.load import LoadedModel, load_model
from nybble.quant.format import NF4Spec
from nybble.quant.linear import DenseLinear, NF4Linear
from tests.host_memory import host_peak, needs_glibc

Tiny = Callable[..., Path]

CPU = torch.device("cpu")
IDS = torch.randint(4, 400, (2, 20), generator=torch.Generator().manual_seed(0))
KINDS = ["llama", "qwen2", "gemma3_text", "phi3", "gpt2"]
# bitsandbytes' CPU build dequantizes wrongly where a block of 64 crosses the end of a row.
WHOLE_BLOCKS = {kind: {} if kind == "gpt2" else {"intermediate_size": 128} for kind in KINDS}

# Transformers warns about its own use of PyTorch while it loads 4-bit weights.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def quantize(folder: Path, output: Path, spec: NF4Spec | None = None, **options: Any) -> QuantizeReport:
    return quantize_checkpoint(Checkpoint.open(str(folder)), output, spec or NF4Spec(), device=CPU, **options)


def load(folder: Path, storage: str | None = None, **settings: Any) -> LoadedModel:
    return load_model(ModelConfig(name=str(folder), **settings), device=CPU, storage=storage)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def nf4_bytes(loaded: LoadedModel) -> dict[str, tuple[torch.Tensor, ...]]:
    modules = loaded.model.named_modules()
    return {path: module.nf4_weight.tensors for path, module in modules if isinstance(module, NF4Linear)}


def same_bytes(first: LoadedModel, second: LoadedModel) -> bool:
    one, other = nf4_bytes(first), nf4_bytes(second)
    pairs = [(left, right) for path in one for left, right in zip(one[path], other[path], strict=True)]
    return one.keys() == other.keys() and all(torch.equal(left, right) for left, right in pairs)


def with_bitsandbytes(folder: Path, **options: Any) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **options).eval()
    for module in model.modules():
        # In evaluation mode on CPUs with AVX-512 for bf16 it repacks weights, with scales rounded to bf16.
        module.train(isinstance(module, Linear4bit))
    return model


@pytest.mark.parametrize("kind", [*KINDS, "mistral", "smollm", "qwen2_moe"])
@pytest.mark.parametrize("spec", [NF4Spec(64, 256), NF4Spec(128, 0)], ids=["double", "plain"])
def test_the_folder_equals_quantizing_while_loading(tiny: Tiny, tmp_path: Path, kind: str, spec: NF4Spec) -> None:
    quantize(tiny(kind), tmp_path / "nf4", spec)
    stored = load(tmp_path / "nf4")
    assert stored.storage == "nf4"
    fresh = load(tiny(kind), "nf4", block_size=spec.block_size, double_quant=spec.double_quant)
    assert nf4_bytes(stored)
    assert same_bytes(stored, fresh)
    assert torch.equal(logits(stored.model), logits(fresh.model))


def test_the_folder_loads_without_quantizing(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(tiny("llama"), tmp_path / "nf4")
    for op in ("nf4_quantize", "absmax_quantize"):
        monkeypatch.setattr(f"nybble.quant.weight.{op}", None)
    assert nf4_bytes(load(tmp_path / "nf4"))
    with pytest.raises(TypeError):
        load(tiny("llama"), "nf4")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", [NF4Spec(64, 256), NF4Spec(64, 0)], ids=["double", "plain"])
def test_transformers_and_bitsandbytes_load_it(tiny: Tiny, tmp_path: Path, kind: str, spec: NF4Spec) -> None:
    quantize(tiny(kind, **WHOLE_BLOCKS[kind]), tmp_path / "nf4", spec)
    theirs = with_bitsandbytes(tmp_path / "nf4")
    assert any(isinstance(module, Linear4bit) for module in theirs.modules())
    torch.testing.assert_close(logits(theirs), logits(load(tmp_path / "nf4").model))
    assert AutoTokenizer.from_pretrained(tmp_path / "nf4").chat_template


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("double_quant", [True, False])
def test_their_folder_loads_here_byte_for_byte(tiny: Tiny, tmp_path: Path, kind: str, double_quant: bool) -> None:
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    theirs = with_bitsandbytes(tiny(kind, **WHOLE_BLOCKS[kind]), quantization_config=settings)
    theirs.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(tiny(kind, **WHOLE_BLOCKS[kind])).save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    torch.testing.assert_close(logits(ours.model), logits(theirs))
    saved = load_file(tmp_path / "theirs" / "model.safetensors")
    quantized = nf4_bytes(ours)
    assert {f"{path}.weight.absmax" for path in quantized} == {key for key in saved if key.endswith(".weight.absmax")}
    for path, (codes, absmax, *_) in quantized.items():
        assert torch.equal(codes.view(-1), saved[f"{path}.weight"].view(-1))
        assert torch.equal(absmax, saved[f"{path}.weight.absmax"])


def test_ours_has_their_keys_and_settings(tiny: Tiny, tmp_path: Path) -> None:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    with_bitsandbytes(tiny("qwen2"), quantization_config=settings).save_pretrained(tmp_path / "theirs")
    quantize(tiny("qwen2"), tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert {key: (tensor.dtype, tensor.shape) for key, tensor in ours.items() if "quant_state" not in key} == {
        key: (tensor.dtype, tensor.shape) for key, tensor in theirs.items() if "quant_state" not in key
    }
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"]


def test_routers_are_left_out_by_name(tiny: Tiny, tmp_path: Path) -> None:
    report = quantize(tiny("qwen2_moe", intermediate_size=128), tmp_path / "nf4")
    assert report.kept == ("lm_head", "model.layers.0.mlp.shared_expert_gate", "model.layers.1.mlp.shared_expert_gate")
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    assert config["quantization_config"]["llm_int8_skip_modules"] == list(report.kept)


def test_experts_stay_as_they_are_and_the_report_says_so(tiny: Tiny, tmp_path: Path) -> None:
    report = quantize(tiny("mixtral", dtype="bfloat16"), tmp_path / "nf4")
    experts = {
        key: tensor for key, tensor in load_file(tmp_path / "nf4" / "model.safetensors").items() if ".experts." in key
    }
    assert {tensor.dtype for tensor in experts.values()} == {torch.bfloat16}
    assert report.expert_weights == sum(tensor.numel() for tensor in experts.values())
    assert report.kept_dtype == "bf16"
    assert quantize(tiny("llama"), tmp_path / "dense").expert_weights == 0


def test_dequantized_on_request(tiny: Tiny, tmp_path: Path) -> None:
    quantize(tiny("llama", dtype="bfloat16"), tmp_path / "nf4")
    packed, dense = load(tmp_path / "nf4"), load(tmp_path / "nf4", "bf16")
    layer = dense.model.model.layers[1].mlp.up_proj
    assert isinstance(layer, DenseLinear)
    assert torch.equal(layer.weight, packed.model.model.layers[1].mlp.up_proj.dequantize(torch.bfloat16))


def test_shards_and_provenance(tiny: Tiny, tmp_path: Path) -> None:
    report = quantize(tiny("llama"), tmp_path / "nf4", max_shard_bytes=60_000)
    assert len(list((tmp_path / "nf4").glob("model-*.safetensors"))) > 2
    assert same_bytes(load(tmp_path / "nf4"), load(tiny("llama"), "nf4"))
    provenance = Provenance.read(tmp_path / "nf4")
    assert provenance is not None
    assert provenance.base_fingerprint == report.fingerprint == Checkpoint.open(str(tiny("llama"))).fingerprint
    assert (provenance.storage, provenance.block_size, provenance.double_quant) == ("nf4", 64, True)
    assert report.kept == ("lm_head",)
    # 4 bits and 8/64 for the scales; their own scales weigh more on matrices of a few thousand values.
    assert 4.125 < report.bits_per_weight < 4.25
    assert report.output_bytes == Checkpoint.open(str(tmp_path / "nf4")).total_bytes < report.source_bytes


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_blocks_make_the_same_folder(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    quantize(tiny(kind, dtype="bfloat16"), tmp_path / "whole")
    monkeypatch.setattr("nybble.models.tensorfile.BLOCK_BYTES", 2**13)
    quantize(tiny(kind, dtype="bfloat16"), tmp_path / "blocks")
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "blocks"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@needs_glibc
def test_no_large_tensor_is_held_whole(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny("llama", hidden_size=1024, intermediate_size=16 * 1024, num_hidden_layers=1)  # of 64 MiB
    monkeypatch.setattr("nybble.models.tensorfile.BLOCK_BYTES", 2**22)
    monkeypatch.setattr("nybble.ops.nf4._CHUNK_VALUES", 2**18)
    with host_peak() as measured:
        quantize(folder, tmp_path / "nf4")
    codes = 9 * 2**20  # and their scales, of the one weight in work
    assert measured.peak_bytes < codes + 24 * 2**20


def test_refusals_leave_nothing_behind(tiny: Tiny, tmp_path: Path) -> None:
    quantize(tiny("smollm"), tmp_path / "nf4")
    with pytest.raises(UserError, match="in 4 bit already"):
        quantize(tmp_path / "nf4", tmp_path / "again")
    with pytest.raises(UserError, match="already exists"):
        quantize(tiny("smollm"), tmp_path / "nf4")
    assert [path.name for path in tmp_path.iterdir()] == ["nf4"]
