"""A calibration pass: what each layer sees, what is made of it, and a folder that everyone reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from nybble.adapters.provenance import Provenance
from nybble.calibrate.finished import FinishedLayers
from nybble.calibrate.moments import InputMoments
from nybble.calibrate.run import Calibration, calibrate
from nybble.calibrate.text import CalibrationText
from nybble.errors import UserError
from nybble.export.quantized import QuantizeReport, quantize_checkpoint
from nybble.models.checkpoint import Checkpoint
from nybble.models.config import ModelConfig
from nybble.models.load import load_model
from nybble.quant.correction import FILE, read_corrections
from nybble.quant.format import NF4Spec
from nybble.quant.linear import NF4Linear

Tiny = Callable[..., Path]

CPU = torch.device("cpu")
KINDS = ["llama", "gemma2", "gemma3_text", "phi3", "gpt2", "qwen2_moe"]


def text(windows: int = 6, length: int = 24) -> CalibrationText:
    # Few different tokens: what layers see lies in few directions, as with real text.
    tokens = torch.randint(4, 40, (windows, length), generator=torch.Generator().manual_seed(1))
    return CalibrationText(tokens, "random")


def prepare(folder: Path, output: Path, rounding: str, rank: int = 4, **options: Any) -> QuantizeReport:
    calibration = Calibration(options.pop("text", text()), rank=rank)
    given = {"rounding": rounding, "calibration": calibration, "device": CPU} | options
    return quantize_checkpoint(Checkpoint.open(str(folder)), output, NF4Spec(), **given)


def model(folder: Path, storage: str | None = None, **settings: Any) -> torch.nn.Module:
    return load_model(ModelConfig(name=str(folder), **settings), device=CPU, storage=storage).model


@torch.no_grad()
def logits(module: torch.nn.Module, ids: Tensor) -> Tensor:
    return module(ids).logits.float()


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_err_less_the_more_is_known(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    seen = text()
    expected = logits(model(tiny(kind), "fp32"), seen.windows)
    errors = {}
    for rounding in ("nearest", "compensated"):
        prepare(tiny(kind), tmp_path / rounding, rounding)
        errors[rounding] = float((logits(model(tmp_path / rounding), seen.windows) - expected).square().mean())
    assert errors["compensated"] < 0.6 * errors["nearest"]


def test_every_window_counts(tiny: Tiny, tmp_path: Path) -> None:
    whole = text(windows=5)
    for last in range(5):
        others = whole.windows.clone()
        others[last] = 50
        prepare(tiny("llama"), tmp_path / str(last), "compensated", rank=0, text=replace(whole, windows=others))
    made = {(tmp_path / str(last) / "model.safetensors").read_bytes() for last in range(5)}
    assert len(made) == 5


@pytest.mark.parametrize(("rounding", "without"), [("nearest", "nearest"), ("compensated", "search")])
def test_what_no_token_reached_is_rounded_without_the_text_and_named(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounding: str, without: str
) -> None:
    absent, add = "model.layers.1.mlp.down_proj", InputMoments._add

    def add_others(self: InputMoments, path: str, inputs: Tensor) -> None:
        if path != absent:
            add(self, path, inputs)

    assert prepare(tiny("llama"), tmp_path / "whole", rounding).unreached == ()
    monkeypatch.setattr(InputMoments, "_add", add_others)
    report = prepare(tiny("llama"), tmp_path / "nf4", rounding)
    assert report.unreached == (absent,)
    assert [note.split(",")[0] for note in report.notes] == [f"rounded by {without}"]
    assert report.notes[0].endswith(f"\n  {absent}")
    plain = model(tiny("llama"), "nf4", rounding=without).get_submodule(absent)
    held = model(tmp_path / "nf4").get_submodule(absent)
    assert torch.equal(held.dequantize(torch.float32), plain.dequantize(torch.float32))
    with pytest.raises(UserError, match=f"no correction for {absent}"):
        read_corrections(tmp_path / "nf4", [absent])


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_those_of_the_whole_model(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    """The first linears of a layer see in the quantized model as a whole what they saw in the pass."""
    seen = text()
    prepare(tiny(kind), tmp_path / "nf4", "nearest", rank=1000)
    loaded = model(tmp_path / "nf4")
    found: dict[str, list[Tensor]] = {}
    first = ("layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj", "layers.1.self_attn.qkv_proj", "h.1.attn.c_attn")
    linears = {path: module for path, module in loaded.named_modules() if path.endswith(first)}
    for path, module in linears.items():
        found[path] = []
        module.register_forward_pre_hook(lambda _, inputs, held=found[path]: held.append(inputs[0].flatten(0, -2)))
    for batch in seen.windows.split(2):
        logits(loaded, batch)
    stock = model(tiny(kind), "fp32")
    corrections = read_corrections(tmp_path / "nf4", list(linears))
    for path, module in linears.items():
        inputs = torch.cat(found[path])
        error = stock.get_submodule(path).weight - module.dequantize(torch.float32)
        left = torch.linalg.svd(error @ inputs.t(), full_matrices=False)[0]
        U, V = corrections[path].rank(3).U, corrections[path].rank(3).V
        best = left[:, :3] @ (left[:, :3].t() @ error)
        torch.testing.assert_close(U @ V @ inputs.t(), best @ inputs.t(), rtol=1e-3, atol=1e-3)
    assert linears


def test_corrections_are_nested_and_whole_at_full_rank(tiny: Tiny, tmp_path: Path) -> None:
    prepare(tiny("llama"), tmp_path / "nf4", "search", rank=1000)
    stock, quantized = model(tiny("llama"), "fp32"), model(tmp_path / "nf4")
    paths = [path for path, module in quantized.named_modules() if isinstance(module, NF4Linear)]
    for path, correction in read_corrections(tmp_path / "nf4", paths).items():
        error = stock.get_submodule(path).weight - quantized.get_submodule(path).dequantize(torch.float32)
        if error.shape[0] <= error.shape[1]:
            torch.testing.assert_close(correction.U @ correction.V, error, rtol=1e-4, atol=1e-5)
        assert correction.rank(2).V.shape == (2, error.shape[1])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_transformers_computes_the_same_from_the_folder(tiny: Tiny, tmp_path: Path) -> None:
    prepare(tiny("llama", intermediate_size=128), tmp_path / "nf4", "compensated")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.float32, device_map="cpu")
    for module in theirs.modules():
        module.train(type(module).__name__ == "Linear4bit")  # see test_quantized
    torch.testing.assert_close(logits(theirs, text().windows), logits(model(tmp_path / "nf4"), text().windows))


def test_an_interrupted_pass_goes_on(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tiny("llama"), tmp_path / "whole", "compensated")
    write, done = FinishedLayers.write, []

    def stop_at_the_second(self: FinishedLayers, index: int, *rest: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        write(self, index, *rest)
        done.append(index)

    monkeypatch.setattr(FinishedLayers, "write", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        prepare(tiny("llama"), tmp_path / "nf4", "compensated")
    assert [path.name for path in tmp_path.iterdir() if "nf4" in path.name] == [".nf4.calibration"]

    def only_the_second(self: FinishedLayers, index: int, *rest: Any) -> None:
        assert index == 1
        write(self, index, *rest)

    monkeypatch.setattr(FinishedLayers, "write", only_the_second)
    prepare(tiny("llama"), tmp_path / "nf4", "compensated")
    for name in ("model.safetensors", FILE):
        assert (tmp_path / "nf4" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / ".nf4.calibration").exists()


def test_another_text_begins_anew(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(tiny("llama")))
    given = (checkpoint, NF4Spec(), "search")
    first = calibrate(*given, Calibration(text()), tmp_path / "pass", device=CPU)
    stamp = (tmp_path / "pass" / "layer-00000.safetensors").stat().st_mtime_ns
    calibrate(*given, Calibration(text()), tmp_path / "pass", device=CPU)
    assert (tmp_path / "pass" / "layer-00000.safetensors").stat().st_mtime_ns == stamp
    other = replace(text(), windows=text().windows.flip(0))
    calibrate(*given, Calibration(other), tmp_path / "pass", device=CPU)
    assert (tmp_path / "pass" / "layer-00000.safetensors").stat().st_mtime_ns != stamp
    assert first.weight("lm_head") is None


def test_the_folder_says_how_it_was_made(tiny: Tiny, tmp_path: Path) -> None:
    report = prepare(tiny("llama"), tmp_path / "nf4", "weighted", rank=0)
    recorded = Provenance.read(tmp_path / "nf4")
    assert recorded is not None
    assert (recorded.rounding, recorded.calibration) == ("weighted", text().digest)
    assert (report.rounding, report.calibration_tokens) == ("weighted", 144)
    assert not (tmp_path / "nf4" / FILE).exists()
    assert load_model(ModelConfig(name=str(tmp_path / "nf4")), device=CPU).provenance.codes == recorded.codes


def test_rounding_by_a_text_needs_one(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a text"):
        quantize_checkpoint(
            Checkpoint.open(str(tiny("llama"))), tmp_path / "nf4", NF4Spec(), device=CPU, rounding="compensated"
        )


def test_search_in_a_pass_equals_search_while_loading(tiny: Tiny, tmp_path: Path) -> None:
    prepare(tiny("llama"), tmp_path / "pass", "search")
    quantize_checkpoint(
        Checkpoint.open(str(tiny("llama"))), tmp_path / "plain", NF4Spec(), device=CPU, rounding="search"
    )
    assert (tmp_path / "pass/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()
    on_the_fly = model(tiny("llama"), "nf4", rounding="search")
    stored = model(tmp_path / "plain")
    for path, module in stored.named_modules():
        if isinstance(module, NF4Linear):
            ours = on_the_fly.get_submodule(path).nf4_weight.tensors
            assert all(torch.equal(one, other) for one, other in zip(ours, module.nf4_weight.tensors, strict=True))
