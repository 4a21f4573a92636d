"""A loaded model computes what Transformers computes from the same files, however its weights are held."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nybble.adapters.provenance import HeadCodes
from nybble.errors import UserError
from nybble.memory.host_matrix import HostEmbedding
from nybble.models.checkpoint import Checkpoint
from nybble.models.config import ModelConfig
from nybble.models.ends import place_ends
from nybble.models.load import LoadedModel, load_model, load_tokenizer
from nybble.plan import MemoryPlan
from nybble.quant.format import NF4Spec
from nybble.quant.linear import DenseLinear, NF4Linear
from nybble.quant.weight import NF4Weight
from tests.host_memory import host_peak, needs_glibc
from tests.tiny import DENSE_KINDS

Tiny = Callable[..., Path]

ALL_KINDS = [*DENSE_KINDS, "mixtral", "qwen2_moe", "qwen3_moe"]
IDS = torch.randint(4, 400, (2, 20), generator=torch.Generator().manual_seed(0))


def load(folder: Path, storage: str | None = None, **settings: Any) -> LoadedModel:
    return load_model(ModelConfig(name=str(folder), **settings), device=torch.device("cpu"), storage=storage)


def reference(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")  # Transformers before 5.18 takes sdpa, which leaves the cap out
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def change_linears(model: PreTrainedModel, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace the weights of all linears but the head's and the routers', as (out, in)."""
    for path, module in model.named_modules():
        if module is model.get_output_embeddings() or path.endswith("shared_expert_gate"):
            continue
        if isinstance(module, Conv1D):
            module.weight.data = change(module.weight.data.t().contiguous()).t().contiguous()
        elif isinstance(module, nn.Linear):
            module.weight.data = change(module.weight.data)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_fp32_gives_the_logits_of_transformers_to_the_bit(tiny: Tiny, kind: str) -> None:
    assert torch.equal(logits(load(tiny(kind)).model), logits(reference(tiny(kind))))


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_weights_held_in_bf16_compute_in_fp32(tiny: Tiny, kind: str) -> None:
    folder = tiny(kind, dtype="bfloat16")
    loaded = load(folder)
    assert loaded.storage == "bf16"
    linears = [module for module in loaded.model.modules() if isinstance(module, DenseLinear)]
    assert {module.weight.dtype for module in linears} == {torch.bfloat16}
    torch.testing.assert_close(logits(loaded.model), logits(reference(folder)))


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_computes_with_the_dequantized_weights(tiny: Tiny, kind: str, double_quant: bool) -> None:
    loaded = load(tiny(kind), "nf4", double_quant=double_quant, block_size=64 if double_quant else 32)
    spec = NF4Spec(64, 256) if double_quant else NF4Spec(32, 0)
    expected = reference(tiny(kind))
    change_linears(expected, lambda weight: NF4Weight.quantize(weight, spec).dequantize(torch.float32))
    torch.testing.assert_close(logits(loaded.model), logits(expected))
    assert any(isinstance(module, NF4Linear) for module in loaded.model.modules())


# Untied and tied.
@pytest.mark.parametrize("storage", ["nf4", None])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "smollm", "qwen2", "gemma2"])
def test_a_head_in_nf4(tiny: Tiny, kind: str, storage: str | None) -> None:
    held, plain = load(tiny(kind), storage, head="nf4", block_size=32), load(tiny(kind), storage, block_size=32)
    head, weight = held.model.get_output_embeddings(), plain.model.get_output_embeddings().weight
    assert isinstance(head, NF4Linear)
    spec = NF4Spec.of(32, double_quant=True)
    assert torch.equal(head.dequantize(torch.float32), NF4Weight.quantize(weight, spec).dequantize(torch.float32))
    assert torch.equal(held.model.get_input_embeddings().weight, plain.model.get_input_embeddings().weight)
    assert held.model.config.tie_word_embeddings is False
    plain.model.get_output_embeddings().weight = nn.Parameter(head.dequantize(torch.float32))
    torch.testing.assert_close(logits(held.model), logits(plain.model))
    assert held.provenance.head == HeadCodes(rounding="nearest", block_size=32, double_quant=True)
    assert plain.provenance.head is None
    assert held.provenance.block_size == (32 if storage == "nf4" else None)


def test_a_tied_head_in_nf4_leaves_its_embedding_in_host_memory(tiny: Tiny) -> None:
    plan = MemoryPlan.uniform(2)
    config = ModelConfig(name=str(tiny("smollm")), head="nf4")
    model = load_model(config, device=torch.device("cpu"), plan=replace(plan, embedding="host")).model
    place_ends(model, replace(plan, embedding="host"), torch.device("cpu"))
    assert isinstance(model.get_input_embeddings(), HostEmbedding)
    with pytest.raises(UserError, match=r"memory\.head: the head cannot lie in host memory: it is a NF4Linear"):
        place_ends(model, replace(plan, head="host"), torch.device("cpu"))


def test_a_tied_head_that_the_file_has_too(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("smollm"), tmp_path / "both")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for change in (0.0, 0.5):
        save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + change}, file, {"format": "pt"})
        model = load(folder, head="nf4").model
        expected = NF4Weight.quantize(tensors["model.embed_tokens.weight"] + change, NF4Spec())
        assert torch.equal(model.lm_head.dequantize(torch.float32), expected.dequantize(torch.float32))


@pytest.mark.parametrize("held", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("storage", ["bf16", "fp16", "fp32", "nf4"])
def test_storage_and_compute_are_two_settings(tiny: Tiny, held: str, storage: str) -> None:
    model = load(tiny("smollm", dtype=held), storage).model
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "nf4": getattr(torch, held)}[
        storage
    ]
    assert model.get_output_embeddings().weight.dtype == wanted
    assert model.model.norm.weight.dtype == torch.float32
    if storage != "nf4":
        assert model.model.layers[0].mlp.up_proj.weight.dtype == wanted
    assert logits(model).dtype == torch.float32
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, reference(tiny("smollm")).model.rotary_emb.inv_freq)


def test_buffers_are_as_exact_as_in_fp32(tiny: Tiny) -> None:
    folder = tiny("gemma3_text", hidden_size=80)  # scales its embeddings by sqrt(80), which bf16 would round
    assert torch.equal(logits(load(folder).model), logits(reference(folder)))


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "gpt2", "mixtral"])
def test_fp32_weights_train_under_bf16_compute(tiny: Tiny, kind: str) -> None:
    loaded = load(tiny(kind), "fp32", compute="bf16")
    model = loaded.model.requires_grad_(True)
    result = model(IDS, labels=IDS)
    # bf16 keeps 8 bits: a few per cent of logits whose standard deviation is 1.
    assert (result.logits - logits(reference(tiny(kind)))).abs().max() < 0.25
    result.loss.backward()
    assert all(parameter.grad is not None and parameter.dtype == torch.float32 for parameter in model.parameters())


def test_everything_is_frozen_and_in_evaluation_mode(tiny: Tiny) -> None:
    model = load(tiny("llama", dtype="bfloat16")).model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_shards_load_like_one_file(tiny: Tiny) -> None:
    sharded = load(tiny("llama", sharded=True))
    assert len({entry.file for entry in sharded.checkpoint.entries.values()}) > 2
    assert torch.equal(logits(sharded.model), logits(load(tiny("llama")).model))


@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_tied_embeddings_are_one_parameter(tiny: Tiny, storage: str) -> None:
    loaded = load(tiny("qwen2"), storage)
    head, embedding = loaded.model.get_output_embeddings(), loaded.model.get_input_embeddings()
    assert head.weight is embedding.weight
    held = {id(tensor): tensor.nbytes for tensor in [*loaded.model.parameters(), *loaded.model.buffers()]}
    assert loaded.weight_bytes == sum(held.values())


def test_generates_the_text_of_transformers(tiny: Tiny) -> None:
    loaded = load(tiny("gemma2"))
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(loaded.model.generate(IDS, **options), reference(tiny("gemma2")).generate(IDS, **options))
    question = loaded.tokenizer("What does this", return_tensors="pt")
    assert loaded.model.generate(**question, **options).shape[1] > question["input_ids"].shape[1]


def test_generation_settings_and_tokenizer_are_the_checkpoints(tiny: Tiny) -> None:
    loaded = load(tiny("llama"))
    assert loaded.model.generation_config.eos_token_id == 1
    assert loaded.tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny("llama")).chat_template


def rewrite(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Copy a one-file checkpoint with its tensors changed."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_old_gpt2_files_without_prefix_and_with_masks_load(tiny: Tiny, tmp_path: Path) -> None:
    def as_first_published(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 512, 512).tril()

    folder = rewrite(tiny("gpt2"), tmp_path / "gpt2", as_first_published)
    assert torch.equal(logits(load(folder).model), logits(load(tiny("gpt2")).model))


def test_tensors_without_a_place_and_parameters_without_a_tensor_are_named(tiny: Tiny, tmp_path: Path) -> None:
    def lose_and_add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.extra_proj.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # older files have it

    folder = rewrite(tiny("llama"), tmp_path / "model", lose_and_add)
    with pytest.raises(UserError) as error:
        load(folder)
    assert "no place for: model.layers.0.mlp.extra_proj.weight\n" in str(error.value)
    assert "no tensor fills: model.layers.1.mlp.up_proj.weight\n" in str(error.value)


def test_a_missing_tied_embedding_is_named(tiny: Tiny, tmp_path: Path) -> None:
    folder = rewrite(tiny("smollm"), tmp_path / "model", lambda tensors: tensors.pop("model.embed_tokens.weight"))
    with pytest.raises(UserError, match=r"no tensor fills: .*model\.embed_tokens\.weight"):
        load(folder)


def test_wrong_shapes_are_named(tiny: Tiny, tmp_path: Path) -> None:
    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1].clone()

    folder = rewrite(tiny("llama"), tmp_path / "model", shorten)
    with pytest.raises(UserError, match=r"embed_tokens.weight has shape \(407, 64\), config.json asks for \(408, 64\)"):
        load(folder)


def test_a_head_stored_beside_its_tied_embedding_is_tied_if_equal(tiny: Tiny, tmp_path: Path) -> None:
    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    model = load(rewrite(tiny("smollm"), tmp_path / "model", add_head)).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_differs_from_its_tied_embedding_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2

    folder = rewrite(tiny("smollm"), tmp_path / "model", add_head)
    model = load(folder).model
    assert not model.config.tie_word_embeddings
    assert torch.equal(logits(model), logits(reference(folder)))


def test_values_beyond_fp16_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 70000.0

    folder = rewrite(tiny("llama"), tmp_path / "model", enlarge)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj has values beyond fp16"):
        load(folder, "fp16")


def test_nan_is_refused_with_the_name(tiny: Tiny, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")

    folder = rewrite(tiny("llama"), tmp_path / "model", spoil)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj.*NaN"):
        load(folder, "nf4")


def test_what_is_open_already_is_not_opened_again(tiny: Tiny) -> None:
    checkpoint = Checkpoint.open(str(tiny("smollm")))
    tokenizer = load_tokenizer(checkpoint)
    loaded = load_model(
        ModelConfig(name="nowhere"), device=torch.device("cpu"), checkpoint=checkpoint, tokenizer=tokenizer
    )
    assert loaded.checkpoint is checkpoint
    assert loaded.tokenizer is tokenizer


def test_an_unknown_kind_is_named(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "llamma"'))
    with pytest.raises(UserError, match="llamma"):
        load(folder)
    config.write_text(config.read_text().replace('"llamma"', '"own", "auto_map": {"AutoConfig": "own.OwnConfig"}'))
    with pytest.raises(UserError, match=r"--set model\.trust_remote_code=true"):
        load(folder)


def test_progress_is_shown_on_a_terminal_on_request(
    tiny: Tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich take any stream for a terminal
    load_model(ModelConfig(name=str(tiny("llama"))), device=torch.device("cpu"), progress=True)
    shown = capsys.readouterr()
    assert "Loading" in shown.err
    load(tiny("llama"))
    assert (shown.out, *capsys.readouterr()) == ("", "", "")


@needs_glibc
@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_the_host_holds_one_tensor_beyond_the_result(tiny: Tiny, storage: str) -> None:
    folder = tiny("llama", hidden_size=512, intermediate_size=1024, num_hidden_layers=10)
    load(tiny("llama"), storage)  # what is imported and allocated once
    with host_peak() as measured:
        loaded = load(folder, storage)
    largest = max(entry.nbytes for entry in loaded.checkpoint.entries.values())
    # Beside the tensor in fp32 its NF4 codes are found through an 8-byte index a weight.
    steps = {"bf16": 2, "nf4": 6}[storage]
    assert measured.peak_bytes < loaded.weight_bytes + steps * largest + 2**22 < loaded.checkpoint.total_bytes


@needs_glibc
@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_the_host_holds_no_large_tensor_beyond_the_result(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, storage: str
) -> None:
    folder = tiny("llama", hidden_size=1024, intermediate_size=16 * 1024, num_hidden_layers=1)
    load(tiny("llama"), storage)
    monkeypatch.setattr("nybble.models.tensorfile.BLOCK_BYTES", 2**22)
    monkeypatch.setattr("nybble.ops.nf4._CHUNK_VALUES", 2**18)
    with host_peak() as measured:
        loaded = load(folder, storage)
    largest = max(entry.nbytes for entry in loaded.checkpoint.entries.values())
    assert measured.peak_bytes - loaded.weight_bytes < 24 * 2**20 < largest / 2


@pytest.mark.parametrize("storage", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3", "mixtral"])
def test_blocks_of_a_weight_make_the_same_model(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, kind: str, storage: str
) -> None:
    folder = tiny(kind, dtype="bfloat16")
    expected = load(folder, storage).model.state_dict()
    monkeypatch.setattr("nybble.models.tensorfile.BLOCK_BYTES", 2**13)  # 4,096 values
    loaded = load(folder, storage)
    found = loaded.model.state_dict()
    assert sum(entry.is_large for entry in loaded.checkpoint.entries.values()) > 4
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.gpu
@pytest.mark.usefixtures("own_allocator")
@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_the_device_holds_one_tensor_beyond_the_result(tiny: Tiny, storage: str) -> None:
    folder = tiny("llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=8)
    device = torch.device("cuda")
    load_model(ModelConfig(name=str(tiny("llama"))), device=device, storage=storage)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loaded = load_model(ModelConfig(name=str(folder)), device=device, storage=storage)
    largest = max(entry.nbytes for entry in loaded.checkpoint.entries.values())
    assert torch.cuda.max_memory_allocated() - before < loaded.weight_bytes + 4 * largest


@pytest.mark.gpu
@pytest.mark.usefixtures("own_allocator")
@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_the_device_holds_no_large_tensor_beyond_the_result(tiny: Tiny, storage: str) -> None:
    folder = tiny("llama", hidden_size=1024, intermediate_size=160 * 1024, num_hidden_layers=1)  # of 640 MiB
    device = torch.device("cuda")
    load_model(ModelConfig(name=str(tiny("llama"))), device=device, storage=storage)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    loaded = load_model(ModelConfig(name=str(folder)), device=device, storage=storage)
    assert torch.cuda.max_memory_reserved() - before < loaded.weight_bytes + 256 * 2**20
