"""Runs whose adapter does not begin at zero: what they train, save and resume, and where the result belongs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from nybble.adapters.difference import difference, save_difference
from nybble.adapters.io import load_adapter
from nybble.adapters.provenance import Provenance
from nybble.adapters.residual import KnownResidual
from nybble.adapters.saved import read_adapter
from nybble.calibrate.run import Calibration
from nybble.calibrate.text import CalibrationText
from nybble.cli import app
from nybble.config import RunConfig
from nybble.data.config import DataConfig
from nybble.errors import UserError
from nybble.evaluation.held_out import held_out_examples, row_losses
from nybble.export.merged import merge_checkpoint
from nybble.export.quantized import quantize_checkpoint
from nybble.export.requantized import merge_to_nf4
from nybble.inference import load_for_inference
from nybble.models.checkpoint import Checkpoint
from nybble.models.config import ModelConfig
from nybble.models.load import LoadedModel, load_model
from nybble.quant.correction import read_corrections
from nybble.quant.format import NF4Spec
from nybble.train.run import RunResult, run_training
from nybble.train.start import check_start
from tests.train.test_state import assert_same, cut_off

Settings = Callable[..., RunConfig]
Tiny = Callable[..., Path]

CPU = torch.device("cpu")
TOKENS = torch.randint(4, 40, (6, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def prepared(tiny: Tiny, tmp_path: Path) -> Callable[..., Path]:
    """A quantized folder of a tiny model, with corrections of rank 6."""

    def make(kind: str = "llama", rounding: str = "nearest") -> Path:
        folder = tmp_path / f"{kind}-{rounding}"
        if not folder.exists():
            calibration = Calibration(CalibrationText(TOKENS, "random"), rank=6)
            base = Checkpoint.open(str(tiny(kind)))
            given = {"rounding": rounding, "calibration": calibration, "device": CPU}
            quantize_checkpoint(base, folder, NF4Spec(), **given)
        return folder

    return make


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(TOKENS).logits.float()


def loaded(folder: Path | str, adapter: Path | None = None, **settings: Any) -> LoadedModel:
    return load_for_inference(ModelConfig(name=str(folder), **settings), adapter)


def plain(folder: Path | str, storage: str) -> Tensor:
    return logits(load_model(ModelConfig(name=str(folder)), device=CPU, storage=storage).model)


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).square().mean().sqrt())


def trained(config: RunConfig) -> RunResult:
    return run_training(config, quiet=True)


def cases(settings: Settings, prepared: Callable[..., Path], init: str, kind: str = "llama", **more: Any) -> RunConfig:
    name = {"model.name": str(prepared(kind))} if init == "calibrated" else {}
    method = {"method": "lora"} if init == "pissa" else {"method": "qlora"}
    return settings(kind, **{"lora.init": init} | method | name | more)


INITS = ["calibrated", "pissa", "loftq"]
BARELY = {"optim.learning_rate": 1e-9, "train.max_steps": 1}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("init", INITS)
def test_the_model_begins_nearer_to_the_original(
    settings: Settings, prepared: Callable[..., Path], tiny: Tiny, init: str, kind: str
) -> None:
    result = trained(cases(settings, prepared, init, kind, **BARELY, **{"lora.r": 16}))
    begun = logits(loaded(tiny(kind), result.folder).model)
    original, quantized = plain(tiny(kind), "fp32"), plain(tiny(kind), "nf4")
    if init == "pissa":
        torch.testing.assert_close(begun, original, atol=1e-4, rtol=1e-4)
        without = load_model(ModelConfig(name=str(tiny(kind))), device=CPU, change=_change(result.folder)).model
        assert gap(logits(without), original) > 0.1 * float(original.std())
    else:
        assert gap(begun, original) < 0.85 * gap(quantized, original)
    provenance = read_adapter(result.folder).provenance
    assert provenance is not None
    assert provenance.init == init
    assert (provenance.residual_fingerprint is None) == (init == "calibrated")


def _change(folder: Path) -> KnownResidual:
    start = read_adapter(folder).start
    assert start is not None
    return KnownResidual(start)


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("rank", [3, 80])
def test_pissa_of_any_rank_and_storage(
    settings: Settings, prepared: Callable[..., Path], method: str, rank: int
) -> None:
    config = cases(settings, prepared, "pissa", **{"method": method, "lora.r": rank})
    result = trained(config)
    assert result.losses[-1] < result.losses[0]
    saved = read_adapter(result.folder)
    assert saved.start is not None
    assert next(iter(saved.start.initial.values())).A.shape[0] == rank


@pytest.mark.parametrize("init", INITS)
def test_the_saved_adapter_is_what_was_trained(settings: Settings, prepared: Callable[..., Path], init: str) -> None:
    config = cases(settings, prepared, init, **{"data.validation_fraction": 0.25})
    result = trained(config)
    data = DataConfig(path=config.data.path, max_length=96, validation_fraction=0.25)
    rows = held_out_examples(config.model, result.folder, data)
    found = loaded(config.model.name, result.folder)
    loss = sum(row_losses(found, rows, batch_size=2)) / sum(row.target_tokens for row in rows)
    assert loss == pytest.approx(result.summary["evaluations"][-1]["loss"], rel=1e-5)


@pytest.mark.parametrize("init", INITS)
def test_the_disk_estimate_counts_the_start(
    settings: Settings, prepared: Callable[..., Path], tmp_path: Path, init: str
) -> None:
    """And the difference, which is made beside the adapter itself."""
    often = {"train.save_every": 3, "train.keep_checkpoints": 9}
    result = trained(cases(settings, prepared, init, **often))
    estimated = result.summary["preflight"]
    started = next((result.output / "checkpoints").iterdir()) / "adapter"
    start_bytes = _tensor_bytes(started / "start.safetensors")
    adapter_bytes = _tensor_bytes(started / "adapter_model.safetensors")
    assert start_bytes > 0
    assert estimated["checkpoint_bytes"] == 3 * adapter_bytes + start_bytes
    final_bytes = estimated["needed_bytes"] - 3 * estimated["checkpoint_bytes"]
    assert final_bytes == adapter_bytes + start_bytes
    other = {"lora.save_as": "difference", "output": str(tmp_path / "difference")}
    doubled = trained(cases(settings, prepared, init, **often, **other)).summary["preflight"]
    assert doubled["needed_bytes"] - estimated["needed_bytes"] == 2 * adapter_bytes


def _tensor_bytes(file: Path) -> int:
    return sum(tensor.nbytes for tensor in load_file(file).values())


@pytest.mark.parametrize("init", INITS)
def test_resuming_changes_nothing(settings: Settings, prepared: Callable[..., Path], tmp_path: Path, init: str) -> None:
    often = {"train.save_every": 3, "train.keep_checkpoints": 9, "lora.lora_dropout": 0.1}
    straight = trained(cases(settings, prepared, init, **often))
    cut_off(straight.output, tmp_path / "cut", 3)
    config = cases(settings, prepared, init, **often, output=str(tmp_path / "cut"))
    assert_same(run_training(config, resume=True, quiet=True), straight)


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_a_resumed_run_takes_out_what_it_did_at_first(
    settings: Settings, prepared: Callable[..., Path], tmp_path: Path, init: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what it would find now: another device or version may find another start."""
    often = {"train.save_every": 3, "train.keep_checkpoints": 9}
    straight = trained(cases(settings, prepared, init, **often))
    cut_off(straight.output, tmp_path / "cut", 3)
    monkeypatch.setattr("nybble.adapters.initialize._ROUNDS", 1)
    config = cases(settings, prepared, init, **often, output=str(tmp_path / "cut"))
    assert_same(run_training(config, resume=True, quiet=True), straight)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("options", [{}, {"lora.use_rslora": True}, {"lora.rank_pattern": {"q_proj": 2}}])
@pytest.mark.parametrize("init", INITS)
def test_difference_is_what_training_changed(
    settings: Settings, prepared: Callable[..., Path], tiny: Tiny, tmp_path: Path, init: str, options: dict[str, Any]
) -> None:
    """On the base itself, by PEFT: the weights moved as they did in training, and by nothing more."""
    result = trained(cases(settings, prepared, init, **options))
    saved = read_adapter(result.folder)
    assert saved.start is not None
    written = CliRunner().invoke(app, ["difference", "-a", str(result.output), "-o", str(tmp_path / "difference")])
    assert written.exit_code == 0
    assert "rank 8" in written.output
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32), tmp_path / "difference"
    )
    moved = model.merge_and_unload().state_dict()
    base = load_file(tiny("llama") / "model.safetensors")
    for path, pair in saved.pairs.items():
        change = pair.scaling * (pair.B @ pair.A) - saved.start.initial[path].product(CPU)
        torch.testing.assert_close(moved[f"{path}.weight"] - base[f"{path}.weight"], change, atol=1e-5, rtol=1e-4)
    ours = logits(loaded(tiny("llama"), tmp_path / "difference").model)
    theirs = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    theirs.load_state_dict(moved)
    torch.testing.assert_close(ours, logits(theirs), atol=1e-4, rtol=1e-4)
    recorded = Provenance.read(tmp_path / "difference")
    assert recorded is not None
    assert recorded.difference
    assert recorded.base == str(tiny("llama"))
    assert difference(read_adapter(tmp_path / "difference")).tensors.keys() == saved.tensors.keys()


def test_difference_of_settings_that_are_left_out(settings: Settings, prepared: Callable[..., Path]) -> None:
    result = trained(cases(settings, prepared, "pissa", **BARELY, **{"lora.r": 8, "lora.lora_alpha": 8}))
    expected, file = difference(read_adapter(result.folder)).config, result.folder / "adapter_config.json"
    kept = {name: value for name, value in json.loads(file.read_text()).items() if name not in ("r", "lora_alpha")}
    file.write_text(json.dumps(kept))
    assert difference(read_adapter(result.folder)).config == expected
    assert (expected.r, expected.lora_alpha) == (16, 16)


def test_a_run_may_save_the_difference(settings: Settings, prepared: Callable[..., Path], tmp_path: Path) -> None:
    one = trained(cases(settings, prepared, "calibrated"))
    two = trained(
        cases(settings, prepared, "calibrated", **{"lora.save_as": "difference", "output": str(tmp_path / "two")})
    )
    expected, found = difference(read_adapter(one.folder)), read_adapter(two.folder)
    assert found.config.r == expected.config.r == 8
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert (two.folder / "tokenizer_config.json").exists()
    assert not (two.folder / "start.safetensors").exists()


def test_a_difference_from_weights_that_nobody_has_is_refused(
    settings: Settings, prepared: Callable[..., Path], tiny: Tiny, tmp_path: Path
) -> None:
    """Of a merge in NF4 the merge itself is not kept; quantized from a folder of its own it is."""
    adapter = read_adapter(trained(settings(output=str(tmp_path / "first"))).folder)
    base, nf4 = Checkpoint.open(str(tiny("llama"))), tmp_path / "nf4"
    seen = Calibration(CalibrationText(TOKENS, "random"), rank=6)
    merge_to_nf4(base, adapter, nf4, NF4Spec(), rounding="nearest", calibration=seen, device=CPU)
    config = cases(settings, prepared, "calibrated", **{"model.name": str(nf4)}, output=str(tmp_path / "second"))
    result = trained(config)
    refused = r"nf4: was quantized from .* merged, and no folder holds those weights"
    with pytest.raises(UserError, match=refused):
        save_difference(read_adapter(result.folder), tmp_path / "difference")
    assert not (tmp_path / "difference").exists()
    with pytest.raises(UserError, match=refused):
        trained(cases(settings, prepared, "calibrated", **{"model.name": str(nf4), "lora.save_as": "difference"}))
    assert not list((tmp_path / "out").glob("*/*"))


@pytest.mark.parametrize("init", INITS)
def test_merging_into_the_original_weights_counts_no_start_twice(
    settings: Settings, prepared: Callable[..., Path], tiny: Tiny, tmp_path: Path, init: str
) -> None:
    result = trained(cases(settings, prepared, init))
    saved = read_adapter(result.folder)
    assert saved.start is not None
    base = Checkpoint.open(str(tiny("llama")))
    merge_checkpoint(base, saved, tmp_path / "merged", base="original")
    merged, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", tiny("llama")))
    for path, pair in saved.pairs.items():
        change = pair.scaling * (pair.B @ pair.A) - saved.start.initial[path].product(CPU)
        torch.testing.assert_close(merged[f"{path}.weight"], before[f"{path}.weight"] + change, atol=1e-5, rtol=1e-4)


def test_merging_into_what_it_was_trained_on_keeps_the_correction(
    settings: Settings, prepared: Callable[..., Path], tmp_path: Path
) -> None:
    config = cases(settings, prepared, "calibrated")
    result = trained(config)
    report = merge_checkpoint(Checkpoint.open(config.model.name), read_adapter(result.folder), tmp_path / "merged")
    assert report.base == "dequantized"
    served = logits(loaded(config.model.name, result.folder).model)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), served, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_residual_bases_are_not_made_of_nf4(
    settings: Settings, prepared: Callable[..., Path], tiny: Tiny, tmp_path: Path, init: str
) -> None:
    result = trained(cases(settings, prepared, init, **{"method": "qlora"}))
    base, saved = Checkpoint.open(str(tiny("llama"))), read_adapter(result.folder)
    with pytest.raises(UserError, match="taken out of the base"):
        merge_checkpoint(base, saved, tmp_path / "merged", base="dequantized")
    assert merge_checkpoint(base, saved, tmp_path / "merged").base == "original"
    with pytest.raises(UserError, match="taken out of"):
        load_adapter(load_model(ModelConfig(name=str(tiny("llama"))), device=CPU).model, result.folder)
    with pytest.raises(UserError, match="in 4 bit"):
        loaded(prepared(), result.folder)


def test_a_correction_belongs_to_its_codes(settings: Settings, prepared: Callable[..., Path], tiny: Tiny) -> None:
    config = cases(settings, prepared, "calibrated", **{"model.name": str(prepared("llama", "compensated"))})
    result = trained(config)
    with pytest.raises(UserError, match="which this model has none of"):
        load_adapter(load_model(ModelConfig(name=str(tiny("llama"))), device=CPU).model, result.folder)
    for wrong in (tiny("llama"), prepared()):
        for storage in ("auto", "nf4"):
            with pytest.raises(UserError, match="trained on"):
                loaded(wrong, result.folder, storage=storage)


def test_a_start_that_is_lost_or_another_is_refused(
    settings: Settings, prepared: Callable[..., Path], tmp_path: Path
) -> None:
    result = trained(cases(settings, prepared, "pissa"))
    lost, other = tmp_path / "lost", tmp_path / "other"
    shutil.copytree(result.folder, lost)
    (lost / "start.safetensors").unlink()
    with pytest.raises(UserError, match=r"no start.safetensors says where"):
        read_adapter(lost)
    shutil.copytree(result.folder, other)
    tensors = load_file(other / "start.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, other / "start.safetensors")
    with pytest.raises(UserError, match="not that of this adapter"):
        read_adapter(other)
    (other / "nybble.json").unlink()  # what is merged then would count the start twice
    with pytest.raises(UserError, match=r"no nybble.json says on which base"):
        read_adapter(other)


def test_plain_adapters_have_no_start(settings: Settings, tmp_path: Path) -> None:
    result = trained(settings())
    saved = read_adapter(result.folder)
    assert saved.start is None
    assert difference(saved) is saved
    with pytest.raises(UserError, match="began at zero"):
        save_difference(saved, tmp_path / "difference")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.init": "calibrated", "method": "qlora"}, "correction.safetensors"),
        ({"lora.init": "calibrated"}, "NF4's error"),
        ({"lora.init": "loftq"}, "NF4's error"),
        ({"lora.save_as": "difference"}, "begins at zero"),
    ],
)
def test_starts_that_the_base_does_not_allow(settings: Settings, changes: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trained(settings(**changes))


def test_a_correction_that_was_cut_off_shows_before_the_model_is_loaded(
    settings: Settings, prepared: Callable[..., Path]
) -> None:
    config = cases(settings, prepared, "calibrated")
    file = Path(config.model.name) / "correction.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-100], whole[:4], b"", b"\xff" * 200):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"correction\.safetensors: is corrupt or truncated.*\n.*nybble quantize"):
            check_start(config, Checkpoint.open(config.model.name))


def test_half_a_correction_is_told(prepared: Callable[..., Path]) -> None:
    tensors = load_file(prepared() / "correction.safetensors")
    path = next(iter(tensors)).removesuffix(".U")
    del tensors[f"{path}.V"]
    save_file(tensors, prepared() / "correction.safetensors")
    with pytest.raises(UserError, match=r"correction\.safetensors: is corrupt or truncated"):
        read_corrections(prepared(), [path])


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_a_4_bit_folder_has_no_weights_to_take_from(
    settings: Settings, prepared: Callable[..., Path], init: str
) -> None:
    with pytest.raises(UserError, match="original weights"):
        trained(settings(**{"lora.init": init, "method": "qlora", "model.name": str(prepared())}))
