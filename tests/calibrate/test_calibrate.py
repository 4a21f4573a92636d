"""A calibration pass: what each layer sees, what is made of it, and a folder that everyone reads."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM

from nybble.adapters.provenance import Provenance, Rounding
from nybble.calibrate import head, run, tune
from nybble.calibrate.calls import behind_layers, record_calls
from nybble.calibrate.correction import CARRIED_RANK, low_rank_correction
from nybble.calibrate.finished import FinishedLayers
from nybble.calibrate.head import logits_of
from nybble.calibrate.layer import Layer, find_stages
from nybble.calibrate.moments import InputMoments
from nybble.calibrate.prepare import correct_linears
from nybble.calibrate.run import Calibration, calibrate
from nybble.calibrate.states import Stream
from nybble.calibrate.text import CalibrationText
from nybble.calibrate.tuned import TunedScales
from nybble.errors import UserError
from nybble.export.quantized import QuantizeReport, quantize_checkpoint
from nybble.models import dtypes, load
from nybble.models.checkpoint import Checkpoint
from nybble.models.config import ModelConfig
from nybble.models.load import load_model
from nybble.models.skeleton import decoder_layers
from nybble.quant.compensation import Compensation
from nybble.quant.correction import FILE, read_corrections
from nybble.quant.format import NF4Spec
from nybble.quant.linear import DenseLinear, NF4Linear
from nybble.quant.weight import NF4Weight

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


def test_what_only_zeros_came_to_counts_as_not_reached(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeroed, add = "model.layers.1.mlp.down_proj", InputMoments._add
    monkeypatch.setattr(
        InputMoments,
        "_add",
        lambda self, path, inputs: add(self, path, inputs * 0 if path == zeroed else inputs),
    )
    assert prepare(tiny("llama"), tmp_path / "nf4", "compensated").unreached == (zeroed,)


def test_a_linear_may_be_called_twice_with_one_tensor() -> None:
    linear, moments, x = nn.Linear(3, 2), InputMoments(), torch.randn(1, 5, 3)
    with moments.watching({"twice": linear}):
        linear(x)
        linear(x)
    ((paths, seen),) = moments.groups()
    assert paths == ["twice"]
    torch.testing.assert_close(seen.moments, x[0].t() @ x[0] / 5)


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


@pytest.mark.parametrize("stage", ["quantized", "tuned", "corrected"])
def test_an_interrupted_pass_goes_on(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    prepare(tiny("llama"), tmp_path / "whole", "compensated")
    write, written = FinishedLayers.write, []

    def stop_at_the_second(self: FinishedLayers, index: int, *rest: Any) -> None:
        if (self.stage, index) == (stage, 1):
            raise KeyboardInterrupt
        write(self, index, *rest)

    monkeypatch.setattr(FinishedLayers, "write", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        prepare(tiny("llama"), tmp_path / "nf4", "compensated")
    assert [path.name for path in tmp_path.iterdir() if "nf4" in path.name] == [".nf4.calibration"]

    def watched(self: FinishedLayers, index: int, *rest: Any) -> None:
        written.append((self.stage, index))
        write(self, index, *rest)

    monkeypatch.setattr(FinishedLayers, "write", watched)
    monkeypatch.setattr(run._Work, "_squares", None)  # tokens are not weighed again
    if stage == "corrected":  # what scales were tuned by is not made again
        monkeypatch.setattr(run._Work, "quantize", None)
    prepare(tiny("llama"), tmp_path / "nf4", "compensated")
    every = [(stage, index) for stage in ("quantized", "tuned", "corrected") for index in range(2)]
    again = every.index((stage, 0 if stage == "tuned" else 1))  # all scales are tuned together
    assert written == every[again:]
    for name in ("model.safetensors", FILE):
        assert (tmp_path / "nf4" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / ".nf4.calibration").exists()


def test_another_text_begins_anew(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(tiny("llama")))
    given = (checkpoint, NF4Spec(), "search")
    first = calibrate(*given, Calibration(text()), tmp_path / "pass", device=CPU)
    stamp = (tmp_path / "pass" / "quantized-00000.safetensors").stat().st_mtime_ns
    calibrate(*given, Calibration(text()), tmp_path / "pass", device=CPU)
    assert (tmp_path / "pass" / "quantized-00000.safetensors").stat().st_mtime_ns == stamp
    other = replace(text(), windows=text().windows.flip(0))
    calibrate(*given, Calibration(other), tmp_path / "pass", device=CPU)
    assert (tmp_path / "pass" / "quantized-00000.safetensors").stat().st_mtime_ns != stamp
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


def test_stages_follow_the_calls(tiny: Tiny) -> None:
    loaded, ids = model(tiny("llama"), "fp32"), text().windows[:1]
    linears = {
        path: module
        for path, module in loaded.named_modules()
        if path.startswith("model.layers.1.") and isinstance(module, DenseLinear)
    }
    stages = find_stages(dict(reversed(linears.items())), lambda: loaded(ids))
    names = [sorted(path.rpartition(".")[2] for path in stage) for stage in stages]
    assert names == [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_experts_are_of_one_stage_and_what_is_not_called_comes_last() -> None:
    names = ["l.0.experts.0.up", "l.0.experts.0.down", "l.0.experts.1.up", "l.0.experts.1.down", "l.0.absent"]
    linears = {name: DenseLinear(4, 4, False, compute_dtype=torch.float32) for name in names}

    def run() -> None:
        for expert in range(2):
            linears[f"l.0.experts.{expert}.down"](linears[f"l.0.experts.{expert}.up"](torch.randn(2, 4)))

    assert find_stages(linears, run) == [names[0:3:2], names[1:4:2], names[4:]]


def test_drift_is_from_what_the_original_sees() -> None:
    linear, original = nn.Linear(4, 4), nn.Linear(4, 4)
    x, y = torch.randn(3, 1, 5, 4), torch.randn(3, 1, 5, 4)
    moments = InputMoments(rows=5)
    with moments.watching({"one": linear, "two": nn.Identity()}, {"one": original}):
        for a, b in zip(x, y, strict=True):
            original(a)
            linear(b)
    [(paths, seen)] = moments.groups()
    assert paths == ["one"]
    a, b = x.view(15, 4), y.view(15, 4)
    torch.testing.assert_close(seen.moments, b.t() @ b / 15)
    torch.testing.assert_close(seen.drift, (a - b).t() @ b / 15)


@pytest.mark.parametrize("others", [4, 3])
def test_rows_of_other_tokens_have_no_drift(others: int) -> None:
    """An expert gets some of the tokens: as many of others' are not those."""
    linear, original = nn.Linear(4, 4), nn.Linear(4, 4)
    moments = InputMoments(rows=5)
    with moments.watching({"one": linear}, {"one": original}):
        for rows, beside in ((5, 5), (4, others)):
            original(torch.randn(beside, 4))
            linear(torch.randn(rows, 4))
    [(_, seen)] = moments.groups()
    assert seen.drift is None


def test_tokens_count_as_they_weigh() -> None:
    linear, original = nn.Linear(4, 4), nn.Linear(4, 4)
    x, y, weights = torch.randn(3, 1, 5, 4), torch.randn(3, 1, 5, 4), torch.rand(3, 5)
    moments = InputMoments(rows=5, weights=weights)
    with moments.watching({"one": linear}, {"one": original}):
        for a, b in zip(x, y, strict=True):
            original(a)
            linear(b)
    [(_, seen)] = moments.groups()
    a, b, weights = x.view(15, 4), y.view(15, 4), weights.view(15, 1)
    torch.testing.assert_close(seen.moments, b.t() @ (weights * b) / 15)
    torch.testing.assert_close(seen.drift, (a - b).t() @ (weights * b) / 15)


def test_windows_that_weigh_more_err_less(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = text()
    monkeypatch.setattr(run, "_BATCH_BYTES", 1)

    def errors(folder: str, weight: float) -> Tensor:
        def weights_of(squares: Tensor) -> Tensor:
            weights = torch.ones_like(squares)
            weights[:3] = weight
            return weights / weights.mean()

        monkeypatch.setattr(run, "weights_of", weights_of)
        prepare(tiny("llama"), tmp_path / folder, "compensated", text=seen)
        found, expected = (logits(model(*of), seen.windows) for of in ((tmp_path / folder,), (tiny("llama"), "fp32")))
        return (found - expected).square().mean((1, 2))

    first, last = errors("first", 100.0), errors("last", 0.01)
    assert first[:3].mean() < 0.8 * last[:3].mean()
    assert last[3:].mean() < 0.8 * first[3:].mean()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_tokens_weigh_the_same_in_parts(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Of what comes to all layers as much is on the host as fits."""
    monkeypatch.setattr(run, "_BATCH_BYTES", 1)
    seen: list[Tensor] = []
    monkeypatch.setattr(run, "weights_of", lambda squares: seen.append(squares) or torch.ones_like(squares))
    prepare(tiny(kind), tmp_path / "whole", "compensated")
    monkeypatch.setattr(run, "_WEIGHED_BYTES", 1)
    prepare(tiny(kind), tmp_path / "parts", "compensated")
    half = len(seen) // 2
    assert half == 2 * 4  # stages
    for whole, parts in zip(seen[:half], seen[half:], strict=True):
        assert whole.shape == (6, 24)
        assert whole.std() > 0.1 * whole.mean()
        torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-6)


def test_later_layers_make_up_for_earlier_ones(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = text(windows=40)
    expected = logits(model(tiny("llama"), "fp32"), seen.windows)

    def error(folder: str) -> float:
        prepare(tiny("llama"), tmp_path / folder, "compensated", text=seen)
        return float((logits(model(tmp_path / folder), seen.windows) - expected).square().mean())

    aimed = error("aimed")
    monkeypatch.setattr(Compensation, "aim", lambda _, weight, drift: weight)  # noqa: ARG005
    assert aimed < error("not")


def divergence(folder: Path, found: Tensor, seen: CalibrationText) -> float:
    """Of the predictions `found` for a text from those of the model in `folder`."""
    expected = log_softmax(logits(model(folder, "fp32"), seen.windows), -1)
    return float(kl_div(log_softmax(found, -1), expected, log_target=True, reduction="sum"))


@pytest.mark.parametrize("kind", KINDS)
def test_tuned_scales_bring_predictions_nearer(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """By 3 to 4 % with these random weights; with those of a trained model by much more."""
    monkeypatch.setattr(run, "STEP_TOKENS", 24)
    seen = text(windows=40)
    prepare(tiny(kind), tmp_path / "tuned", "compensated", rank=0, text=seen)
    monkeypatch.setattr(run, "available_host_bytes", lambda: 0)
    prepare(tiny(kind), tmp_path / "not", "compensated", rank=0, text=seen)
    tuned, other = (
        divergence(tiny(kind), logits(model(tmp_path / name), seen.windows), seen) for name in ("tuned", "not")
    )
    assert tuned < 0.985 * other


def test_where_memory_lacks_scales_stay_and_that_is_told(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "available_host_bytes", lambda: 0)
    report = prepare(tiny("llama"), tmp_path / "nf4", "compensated")
    assert report.untuned_bytes > 0
    assert report.notes[0].startswith("scales were not tuned together, which takes")
    linears = [path for path, module in model(tmp_path / "nf4").named_modules() if isinstance(module, NF4Linear)]
    assert {found.U.shape[1] for found in read_corrections(tmp_path / "nf4", linears).values()} == {4}


def test_corrections_begun_on_untuned_scales_go_on_there_with_more_memory(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "available_host_bytes", lambda: 0)
    wanted = prepare(tiny("llama"), tmp_path / "whole", "compensated")
    write = FinishedLayers.write

    def stop(self: FinishedLayers, index: int, *rest: Any) -> None:
        if (self.stage, index) == ("corrected", 1):
            raise KeyboardInterrupt
        write(self, index, *rest)

    monkeypatch.setattr(FinishedLayers, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(tiny("llama"), tmp_path / "nf4", "compensated")
    monkeypatch.undo()
    assert prepare(tiny("llama"), tmp_path / "nf4", "compensated").untuned_bytes == wanted.untuned_bytes
    assert (tmp_path / "nf4/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def with_value(folder: Path, to: Path, name: str, value: float) -> Path:
    """A copy of a model with one value of the weight `name` replaced."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    tensors[name].view(-1)[0] = value
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("rounding", ["nearest", "search", "weighted", "compensated"])
def test_a_weight_that_is_not_finite_is_named(tiny: Tiny, tmp_path: Path, rounding: str) -> None:
    folder = with_value(tiny("llama"), tmp_path / "model", "model.layers.1.mlp.up_proj.weight", torch.nan)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj: holds NaN"):
        prepare(folder, tmp_path / "nf4", rounding)


@pytest.mark.parametrize("rounding", ["nearest", "search", "weighted"])
def test_inputs_that_are_not_finite_are_named(tiny: Tiny, tmp_path: Path, rounding: str) -> None:
    folder = with_value(tiny("llama"), tmp_path / "model", "model.layers.0.mlp.down_proj.weight", 3e38)
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.[qkv]_proj: its inputs are not finite"):
        prepare(folder, tmp_path / "nf4", rounding)
    assert not (tmp_path / "nf4").exists()


def test_the_gradient_of_scales_is_that_of_the_divergence(tiny: Tiny, tmp_path: Path) -> None:
    """Through layers that are run again, and logits in chunks."""
    prepare(tiny("llama"), tmp_path / "nf4", "nearest", rank=0)
    stock, seen = model(tiny("llama"), "fp32"), text(windows=1).windows
    loaded = model(tmp_path / "nf4")
    calls, [hidden] = record_calls(loaded, seen)
    layers = [
        Layer(path, module, call) for (path, module), call in zip(decoder_layers(loaded).items(), calls, strict=True)
    ]
    linears = {}
    for path, linear in list(loaded.named_modules()):
        if isinstance(linear, NF4Linear):
            linears[path] = TunedScales(linear.nf4_weight, None, torch.float32)
            loaded.set_submodule(path, linears[path])
    target, predict = hidden, logits_of(loaded)
    for layer in layers:
        with torch.no_grad():
            target = layer.call(stock.get_submodule(layer.at), target)
    with torch.no_grad(), behind_layers(loaded, *seen.shape) as go_on:
        tune._add_gradients(layers, hidden, partial(tune._divergence, go_on, predict, 5, target))
    assert not hidden.requires_grad  # a stream's window, which is gone through again
    made = {path: linear.absmax.grad for path, linear in linears.items()}
    found, expected = (log_softmax(module(seen).logits.float(), -1) for module in (loaded, stock))
    wanted = torch.autograd.grad(
        kl_div(found, expected.detach(), log_target=True, reduction="sum"), [line.absmax for line in linears.values()]
    )
    for (path, gradient), other in zip(made.items(), wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-5, msg=path)


def corrected_model(folder: Path) -> nn.Module:
    """The model of a prepared folder in fp32, its corrections added."""
    loaded = model(folder, "fp32")
    paths = [path for path, module in model(folder).named_modules() if isinstance(module, NF4Linear)]
    for path, correction in read_corrections(folder, paths).items():
        loaded.get_parameter(f"{path}.weight").data.addmm_(correction.U, correction.V)
    return loaded


def inputs_of(module: nn.Module, path: str, ids: Tensor) -> Tensor:
    """What the linear at `path` sees, (tokens, in)."""
    found: list[Tensor] = []
    with module.get_submodule(path).register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].flatten(0, -2))):
        logits(module, ids)
    return found[0]


@pytest.mark.parametrize("path", ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.q_proj"])
def test_corrections_are_for_the_inputs_of_the_corrected_model(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    seen = text(windows=40).windows
    weights = torch.linspace(0.2, 1.8, seen.numel())
    monkeypatch.setattr(run, "weights_of", lambda squares: weights.view_as(squares).clone())
    prepare(tiny("llama"), tmp_path / "nf4", "compensated", text=text(windows=40))
    stock = model(tiny("llama"), "fp32")
    x, z = (inputs_of(module, path, seen) for module in (stock, corrected_model(tmp_path / "nf4")))
    weighed = weights[:, None] * z / len(z)
    inputs = Compensation.of(z.t() @ weighed)
    target = inputs.aim(stock.get_parameter(f"{path}.weight").detach(), (x - z).t() @ weighed)
    error = target - model(tmp_path / "nf4").get_submodule(path).dequantize(torch.float32)
    best, made = low_rank_correction(error, inputs.metric, 4), read_corrections(tmp_path / "nf4", [path])[path]
    torch.testing.assert_close(made.U @ made.V, best.U @ best.V, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_corrections_are_for_what_corrected_layers_give(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    seen = text(windows=40)
    expected = logits(model(tiny(kind), "fp32"), seen.windows)

    def error(folder: str) -> float:
        prepare(tiny(kind), tmp_path / folder, "compensated", text=seen, rank=16)
        return float((logits(corrected_model(tmp_path / folder), seen.windows) - expected).square().mean())

    second = error("second")
    monkeypatch.setattr(Layer, "correct_", Layer.quantize_)
    first = error("first")
    assert second < 0.8 * first
    base = float((logits(model(tmp_path / "first"), seen.windows) - expected).square().mean())
    assert second < base
    assert (tmp_path / "first/model.safetensors").read_bytes() == (tmp_path / "second/model.safetensors").read_bytes()


def test_corrections_begin_with_those_of_a_lower_rank(tiny: Tiny, tmp_path: Path) -> None:
    """As more than a part of them is never carried along."""
    for rank in (CARRIED_RANK, 24):
        prepare(tiny("llama"), tmp_path / str(rank), "compensated", rank=rank)
    linears = [path for path, module in model(tmp_path / "24").named_modules() if isinstance(module, NF4Linear)]
    low, high = (read_corrections(tmp_path / str(rank), linears) for rank in (CARRIED_RANK, 24))
    for path in linears:
        part = high[path].rank(CARRIED_RANK)
        torch.testing.assert_close(low[path].U @ low[path].V, part.U @ part.V, rtol=1e-3, atol=1e-5)
        assert high[path].U.shape[1] == 24


@pytest.mark.parametrize(
    ("rounding", "rank", "expected"), [("compensated", 4, 2), ("compensated", 0, 2), ("search", 4, 1)]
)
def test_no_more_states_are_kept_than_are_needed(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounding: str, rank: int, expected: int
) -> None:
    alive: weakref.WeakSet[Stream] = weakref.WeakSet()
    most, begin = 0, Stream.__init__

    def counted(self: Stream, *given: Any) -> None:
        nonlocal most
        alive.add(self)
        most = max(most, len(alive))
        begin(self, *given)

    monkeypatch.setattr(Stream, "__init__", counted)
    prepare(tiny("llama"), tmp_path / "nf4", rounding, rank=rank)
    assert most == expected
    assert (tmp_path / "nf4" / FILE).exists() == (rank > 0)


@pytest.mark.parametrize("name", ["DAMPING", "ROUNDS", "CARRIED_RANK", "PASSES", "SCALE_RATE", "STEP_TOKENS"])
def test_another_method_begins_anew(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    settings, opened = [], FinishedLayers.open

    def watched(folder: Path, given: dict[str, Any]) -> FinishedLayers:
        settings.append(given)
        return opened(folder, given)

    monkeypatch.setattr(FinishedLayers, "open", watched)
    for value in (1, 2):
        monkeypatch.setattr(run, name, value)
        calibrate(
            Checkpoint.open(str(tiny("llama"))), NF4Spec(), "search", Calibration(text()), tmp_path / "pass", device=CPU
        )
    assert settings[0] != settings[1]


def test_a_pass_begun_in_another_compute_dtype_begins_anew(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other batches go through it together, so weights of tokens that were kept are of other shapes."""
    monkeypatch.setattr(
        run, "_BATCH_BYTES", 2 * text().windows[0].numel() * 64 * 4
    )  # two windows in fp32, four in bf16
    write, resolve = FinishedLayers.write, dtypes.resolve_compute

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FinishedLayers, "write", stop)
    for module in (run, load):
        monkeypatch.setattr(module, "resolve_compute", lambda *_: torch.bfloat16)
    with pytest.raises(KeyboardInterrupt):
        prepare(tiny("llama"), tmp_path / "nf4", "compensated")
    for module in (run, load):
        monkeypatch.setattr(module, "resolve_compute", resolve)
    monkeypatch.setattr(FinishedLayers, "write", write)
    prepare(tiny("llama"), tmp_path / "nf4", "compensated")


def test_a_model_that_cannot_be_tuned_is_refused_before_a_layer_is_done(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(_: Any) -> None:
        raise UserError("makes its logits in a way that is not known here")

    monkeypatch.setattr(head, "find_logit_rule", unknown)
    with pytest.raises(UserError, match="makes its logits"):
        prepare(tiny("llama"), tmp_path / "nf4", "compensated")
    assert not list((tmp_path / ".nf4.calibration").glob("*.safetensors"))
    prepare(tiny("llama"), tmp_path / "nf4", "weighted")


def test_predictions_that_are_not_finite_are_told(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def infinite(*given: Any) -> Tensor:
        hidden: Tensor = given[-1]
        return torch.full_like(hidden, torch.inf)

    monkeypatch.setattr(tune, "_divergence", infinite)
    with pytest.raises(UserError, match="not finite: they tune nothing"):
        prepare(tiny("llama"), tmp_path / "nf4", "compensated")
    assert not (tmp_path / "nf4").exists()


@pytest.mark.parametrize(
    ("rounding", "rank", "stage"),
    [("weighted", 8, "quantized"), ("compensated", 0, "tuned"), ("compensated", 8, "corrected")],
)
def test_what_is_all_there_is_taken_without_the_model(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounding: Rounding, rank: int, stage: str
) -> None:
    given = (Checkpoint.open(str(tiny("llama"))), NF4Spec(), rounding, Calibration(text(), rank), tmp_path / "pass")
    calibrate(*given, device=CPU)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it is not needed")

    monkeypatch.setattr(run, "load_model", refuse)
    again = calibrate(*given, device=CPU)
    assert (again.stage, again.untuned_bytes) == (stage, 0)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_memory_that_lacks_in_the_middle_leaves_codes_untuned(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def lack(*_: Any) -> None:
        raise error

    monkeypatch.setattr(tune, "_divergence", lack)
    assert prepare(tiny("llama"), tmp_path / "nf4", "compensated").untuned_bytes > 0


def test_other_errors_end_the_tuning(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(tune, "_divergence", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        prepare(tiny("llama"), tmp_path / "nf4", "compensated")


def test_tuning_counts_what_stays_in_16_bits(tiny: Tiny) -> None:
    """As experts, which one tensor holds."""
    loaded = model(tiny("qwen2_moe"), "fp32")
    layers = list(decoder_layers(loaded).values())
    whole = sum(tensor.nbytes for layer in layers for tensor in layer.parameters())
    needed = tune.tuning_bytes([(layer, []) for layer in layers], states_bytes=0, block_size=64)
    assert needed == whole + 5 * head.CHUNK_BYTES


def test_inputs_that_only_the_quantized_model_gives_count_alike() -> None:
    """As of an expert that no token of the corrected model came to."""
    linear = DenseLinear(64, 48, False, compute_dtype=torch.float32)
    quantized = NF4Weight.quantize(linear.weight.detach(), NF4Spec())
    [(path, found)] = correct_linears({"one": linear}, InputMoments(), {"one": quantized}, 8)
    left, sizes, right = torch.linalg.svd(linear.weight.detach() - quantized.dequantize(torch.float32))
    assert path == "one"
    torch.testing.assert_close(found.U @ found.V, left[:, :8] * sizes[:8] @ right[:8], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_at_once_give_what_single_ones_do(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Up to how sums are rounded, which moves few codes; independent errors would differ by twice what they are."""
    seen = text(windows=12)
    prepare(tiny(kind), tmp_path / "together", "compensated", text=seen)
    monkeypatch.setattr(run, "_BATCH_BYTES", 1)
    prepare(tiny(kind), tmp_path / "single", "compensated", text=seen)
    stock, together, single = (
        logits(model(folder, *storage), seen.windows)
        for folder, *storage in ((tiny(kind), "fp32"), (tmp_path / "together",), (tmp_path / "single",))
    )
    assert (together - single).square().mean() < 0.5 * (together - stock).square().mean()


@pytest.mark.parametrize(("windows", "most", "expected"), [(12, 5, 4), (128, 8, 8), (7, 3, 1), (3, 8, 3), (6, 0, 1)])
def test_as_many_windows_at_once_as_leave_no_smaller_batch(windows: int, most: int, expected: int) -> None:
    assert run._at_once(windows, most) == expected


def test_windows_of_batches_come_by_their_numbers() -> None:
    hidden = torch.randn(6, 3, 2)
    stream = Stream(hidden.split(2), CPU)
    assert (len(stream), stream.length, stream.rows) == (6, 3, 6)
    assert all(
        torch.equal(found, hidden[numbers])
        for found, numbers in zip(stream.windows([[5, 0], [3]]), ([5, 0], [3]), strict=True)
    )
    assert torch.equal(torch.cat(list(stream.on_device())), hidden)
