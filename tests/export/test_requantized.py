"""Merged weights in NF4, and that adapters meet only the NF4 codes that they were trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nybble.adapters.config import LoraConfig
from nybble.adapters.inject import inject
from nybble.adapters.io import save_adapter
from nybble.adapters.saved import read_adapter
from nybble.calibrate.run import Calibration
from nybble.calibrate.text import CalibrationText
from nybble.compare.merge_check import measure_merge
from nybble.data.collate import Batch
from nybble.data.config import DataConfig
from nybble.errors import UserError
from nybble.evaluation.held_out import held_out_batches, held_out_examples
from nybble.export.measure import ModelOutputs, measure_outputs
from nybble.export.merged import Measure, default_base, merge_checkpoint
from nybble.export.quantized import quantize_checkpoint
from nybble.export.requantized import RequantizedReport, merge_to_nf4
from nybble.inference import load_for_inference
from nybble.models.checkpoint import Checkpoint
from nybble.models.config import ModelConfig
from nybble.models.load import LoadedModel, load_model
from nybble.quant.format import NF4Spec
from nybble.quant.linear import NF4Linear
from tests.adapters.support import CPU, logits, randomized, tokens

Tiny = Callable[..., Path]


def calibration() -> Calibration:
    return Calibration(CalibrationText(torch.randint(4, 40, (6, 24), generator=torch.Generator().manual_seed(1)), "x"))


def trained(folder: Path, output: Path, **settings: Any) -> LoadedModel:
    """A model with an adapter of random numbers, saved as training saves it."""
    loaded = load_model(ModelConfig(name=str(folder), **settings), device=CPU)
    inject(loaded.model, LoraConfig(r=4, lora_alpha=10))
    randomized(loaded.model)
    save_adapter(loaded.model, output, provenance=loaded.provenance)
    return loaded


def prepared(folder: Path, output: Path, rounding: str = "compensated") -> Path:
    given = {"rounding": rounding, "calibration": calibration(), "device": CPU}
    quantize_checkpoint(Checkpoint.open(str(folder)), output, NF4Spec(), **given)
    return output


def to_nf4(folder: Path, adapter: Path, output: Path, **options: object) -> RequantizedReport:
    checkpoint = Checkpoint.open(str(folder))
    return merge_to_nf4(checkpoint, read_adapter(adapter), output, NF4Spec(), device=CPU, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
def test_from_original_weights_with_less_error_than_plain_rounding(tiny: Tiny, tmp_path: Path, storage: str) -> None:
    trained(tiny("llama"), tmp_path / "adapter", storage=storage)
    adapter = read_adapter(tmp_path / "adapter")
    merge_checkpoint(Checkpoint.open(str(tiny("llama"))), adapter, tmp_path / "whole", base="original")
    whole = load_model(ModelConfig(name=str(tmp_path / "whole")), device=CPU).model
    ids, errors = calibration().text.windows, {}
    for rounding in ("nearest", "search", "compensated"):
        seen = calibration() if rounding == "compensated" else None
        report = to_nf4(tiny("llama"), tmp_path / "adapter", tmp_path / rounding, rounding=rounding, calibration=seen)
        assert (report.merged.base, report.quantized.rounding) == ("original", rounding)
        assert "rounded to 4 bits once" in report.merged.reason
        rounded = load_model(ModelConfig(name=str(tmp_path / rounding)), device=CPU).model
        assert any(isinstance(module, NF4Linear) for module in rounded.modules())
        with torch.no_grad():
            errors[rounding] = float((rounded(ids).logits - whole(ids).logits).square().mean())
    assert errors["compensated"] < 0.6 * errors["nearest"]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_record_has_both_losses(tiny: Tiny, tmp_path: Path) -> None:
    loaded = trained(tiny("llama"), tmp_path / "adapter", storage="fp32")
    measure = held_out_measure(loaded.model)
    report = to_nf4(tiny("llama"), tmp_path / "adapter", tmp_path / "nf4", measure=measure)
    record = json.loads((tmp_path / "nf4/merge.json").read_text())
    assert (record["storage"], record["rounding"], record["nf4_loss"]) == ("nf4", "search", report.loss)
    assert record["measured"]["original"]["merged_loss"] == pytest.approx(measure.reference.loss, rel=1e-4)
    assert report.loss == measure.outputs(tmp_path / "nf4").loss


def held_out_measure(model: nn.Module) -> Measure:
    ids = tokens()
    labels, positions = ids.clone(), torch.arange(ids.shape[1]).expand(ids.shape)
    labels[:, 0] = -100
    batch = Batch(ids, labels, positions, int((labels != -100).sum()))

    def outputs(folder: Path) -> ModelOutputs:
        return measure_outputs(load_model(ModelConfig(name=str(folder)), device=CPU).model, [batch])

    return Measure(outputs, measure_outputs(model, [batch]))


def test_with_data_the_better_of_both_bases_is_kept_in_nf4(tiny: Tiny, tmp_path: Path) -> None:
    loaded = trained(tiny("llama"), tmp_path / "adapter", storage="nf4")
    measure = held_out_measure(loaded.model)
    losses = {
        base: to_nf4(tiny("llama"), tmp_path / "adapter", tmp_path / base, base=base, measure=measure).loss
        for base in ("original", "dequantized")
    }
    report = to_nf4(tiny("llama"), tmp_path / "adapter", tmp_path / "nf4", measure=measure)
    assert report.loss == min(losses.values())
    assert report.loss == measure.outputs(tmp_path / "nf4").loss
    assert losses[report.merged.base] == report.loss
    record = json.loads((tmp_path / "nf4/merge.json").read_text())
    assert (record["base"], record["nf4_loss"]) == (report.merged.base, report.loss)
    assert "the lower held-out loss in NF4 of both bases" in record["reason"]
    assert f"original {losses['original']:.4f}" in report.merged.reason
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("measured", [False, True])
def test_a_folder_that_came_to_be_there_is_kept_and_the_finished_one_too(
    tiny: Tiny, tmp_path: Path, measured: bool
) -> None:
    loaded = trained(tiny("llama"), tmp_path / "adapter", storage="nf4")
    output, measure = tmp_path / "nf4", held_out_measure(loaded.model)

    def outputs(folder: Path) -> ModelOutputs:
        output.mkdir(exist_ok=True)
        (output / "file").write_text("theirs")
        return measure.outputs(folder)

    options = {} if measured else {"base": "original"}
    with pytest.raises(UserError, match=r"already exists(?s:.*)nf4-2"):
        to_nf4(tiny("llama"), tmp_path / "adapter", output, measure=replace(measure, outputs=outputs), **options)
    assert [file.name for file in output.iterdir()] == ["file"]
    assert json.loads((tmp_path / "nf4-2/merge.json").read_text())["storage"] == "nf4"
    assert measure.outputs(tmp_path / "nf4-2").loss > 0
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "nf4", "nf4-2"}


def test_a_merge_into_the_original_is_measured_beside_the_prepared_base(tiny: Tiny, tmp_path: Path) -> None:
    folder = prepared(tiny("llama"), tmp_path / "prepared")
    loaded = trained(folder, tmp_path / "adapter")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"row {i} of some"}) for i in range(4)))
    measure = measure_merge(ModelConfig(name=str(tiny("llama"))), tmp_path / "adapter", DataConfig(path=str(rows)))
    examples = held_out_examples(ModelConfig(name=str(folder)), tmp_path / "adapter", DataConfig(path=str(rows)))
    assert measure.reference.loss == measure_outputs(loaded.model, held_out_batches(loaded, examples, 4)).loss
    original = Checkpoint.open(str(tiny("llama")))
    report = merge_checkpoint(original, read_adapter(tmp_path / "adapter"), tmp_path / "merged", measure=measure)
    assert report.measured["original"].adapter_loss == measure.reference.loss


def test_the_merged_folder_is_a_base_of_its_own(tiny: Tiny, tmp_path: Path) -> None:
    trained(tiny("llama"), tmp_path / "adapter", storage="nf4")
    to_nf4(tiny("llama"), tmp_path / "adapter", tmp_path / "nf4")
    with pytest.raises(UserError, match="not those of this model"):
        load_for_inference(ModelConfig(name=str(tmp_path / "nf4")), tmp_path / "adapter")


def test_an_adapter_goes_back_onto_the_codes_that_it_was_trained_on(tiny: Tiny, tmp_path: Path) -> None:
    folder = prepared(tiny("llama"), tmp_path / "prepared")
    model = trained(folder, tmp_path / "adapter").model
    again = load_for_inference(ModelConfig(name=str(folder)), tmp_path / "adapter")
    assert torch.equal(logits(again.model), logits(model))
    with pytest.raises(UserError, match=r"cannot be made from these weights(?s:.*)prepared"):
        load_for_inference(ModelConfig(name=str(tiny("llama"))), tmp_path / "adapter")
    plain = tmp_path / "plain"
    quantize_checkpoint(Checkpoint.open(str(tiny("llama"))), plain, NF4Spec(), device=CPU)
    with pytest.raises(UserError, match=r"nearest rounding (?s:.*); the adapter was trained on those of compensated"):
        load_for_inference(ModelConfig(name=str(plain)), tmp_path / "adapter")


@pytest.mark.parametrize("spec", [NF4Spec.of(32, double_quant=True), NF4Spec.of(64, double_quant=False)])
def test_codes_of_other_blocks_are_refused(tiny: Tiny, tmp_path: Path, spec: NF4Spec) -> None:
    for name, own in (("mine", NF4Spec()), ("other", spec)):
        quantize_checkpoint(Checkpoint.open(str(tiny("llama"))), tmp_path / name, own, device=CPU)
    trained(tmp_path / "mine", tmp_path / "adapter")
    adapter, other = read_adapter(tmp_path / "adapter"), Checkpoint.open(str(tmp_path / "other"))
    found = "in blocks of 32" if spec.block_size == 32 else "no double quantization"
    with pytest.raises(
        UserError, match=rf"{found}(?s:.*)trained on those of nearest rounding in blocks of 64 \(double"
    ):
        merge_checkpoint(other, adapter, tmp_path / "merged", base="dequantized")


def test_other_codes_of_one_description_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    """As of scales that were tuned with more memory, or on another device."""
    folder = prepared(tiny("llama"), tmp_path / "prepared")
    trained(folder, tmp_path / "adapter")
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    load_for_inference(ModelConfig(name=str(other)), tmp_path / "adapter")  # the same, elsewhere
    tensors = load_file(other / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("q_proj.weight.absmax"))
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"other NF4 codes than those that (?s:.*) though of compensated"):
        load_for_inference(ModelConfig(name=str(other)), tmp_path / "adapter")


@pytest.mark.parametrize("held", ["fp32", "nf4", "prepared"])
@pytest.mark.parametrize("rounding", ["nearest", "search"])
def test_a_head_in_nf4_is_made_again_as_it_was_trained(tiny: Tiny, tmp_path: Path, held: str, rounding: str) -> None:
    folder = prepared(tiny("llama"), tmp_path / "prepared") if held == "prepared" else tiny("llama")
    settings = {"storage": "auto" if held == "prepared" else held, "head": "nf4", "rounding": rounding}
    model = trained(folder, tmp_path / "adapter", block_size=32, **settings).model
    other = "nearest" if rounding == "search" else "search"
    again = load_for_inference(ModelConfig(name=str(folder), rounding=other), tmp_path / "adapter")
    assert torch.equal(logits(again.model), logits(model))


def test_a_search_is_made_again_while_loading(tiny: Tiny, tmp_path: Path) -> None:
    model = trained(tiny("llama"), tmp_path / "adapter", storage="nf4", rounding="search").model
    again = load_for_inference(ModelConfig(name=str(tiny("llama"))), tmp_path / "adapter")
    assert torch.equal(logits(again.model), logits(model))
    merge = merge_checkpoint(
        Checkpoint.open(str(tiny("llama"))), read_adapter(tmp_path / "adapter"), tmp_path / "merged", base="dequantized"
    )
    assert merge.base == "dequantized"
    merged = load_model(ModelConfig(name=str(tmp_path / "merged")), device=CPU).model
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=3e-5)


def test_calibrated_codes_are_not_guessed_by_a_merge(tiny: Tiny, tmp_path: Path) -> None:
    folder = prepared(tiny("llama"), tmp_path / "prepared")
    trained(folder, tmp_path / "adapter")
    original, adapter = Checkpoint.open(str(tiny("llama"))), read_adapter(tmp_path / "adapter")
    assert default_base(original, adapter)[0] == "original"
    with pytest.raises(UserError, match="cannot be made from these weights"):
        merge_checkpoint(original, adapter, tmp_path / "merged", base="dequantized")
    model = load_for_inference(ModelConfig(name=str(folder)), tmp_path / "adapter").model
    merge_checkpoint(Checkpoint.open(str(folder)), adapter, tmp_path / "merged", dtype=torch.float32)
    merged = load_model(ModelConfig(name=str(tmp_path / "merged")), device=CPU).model
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=3e-5)
