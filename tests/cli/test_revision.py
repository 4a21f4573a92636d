"""The revision of an adapter's base: written by a run, and taken where the adapter's own base is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from nybble.adapters.config import LoraConfig
from nybble.adapters.inject import inject
from nybble.adapters.io import save_adapter
from nybble.adapters.provenance import Provenance
from nybble.adapters.saved import read_adapter
from nybble.calibrate.run import Calibration
from nybble.calibrate.text import CalibrationText
from nybble.compare import merge_check
from nybble.export.quantized import quantize_checkpoint
from nybble.models.checkpoint import Checkpoint
from nybble.models.config import ModelConfig
from nybble.models.load import load_model
from nybble.quant.format import NF4Spec
from tests.adapters.support import CPU, randomized, tokens
from tests.cli.conftest import SMALL

Nybble = Callable[..., Result]
Hub = dict[str | None, Path]

pytestmark = pytest.mark.usefixtures("hub")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """As PEFT writes it for org/model at v1.0, without word of the weights that were its base."""
    loaded = load_model(ModelConfig(name="org/model", revision="v1.0"), device=CPU)
    inject(loaded.model, LoraConfig(r=4))
    save_adapter(randomized(loaded.model), tmp_path / "adapter", provenance=loaded.provenance)
    (tmp_path / "adapter" / "nybble.json").unlink()
    return tmp_path / "adapter"


def fingerprint(folder: Path) -> str:
    return Checkpoint.open(str(folder)).fingerprint


@pytest.mark.parametrize(
    ("given", "revision"),
    [
        ((), "v1.0"),
        (("--set", "model.revision=v2.0"), "v2.0"),
        (("--set", "model.revision=null"), None),
        (("--model", "org/model"), None),
        (("--set", "model.name=org/model"), None),
    ],
)
def test_merge_takes_the_base_at_the_revision_of_the_adapter_unless_told_otherwise(
    nybble: Nybble,
    hub: Hub,
    tiny: Callable[..., Path],
    adapter: Path,
    tmp_path: Path,
    given: tuple[str, ...],
    revision: str | None,
) -> None:
    hub["v2.0"] = tiny("smollm", seed=2)
    nybble("merge", "--adapter", adapter, "--output", tmp_path / "merged", *given)
    merged = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert merged["fingerprint"] == fingerprint(hub[revision])


def test_eval_does_so_too(nybble: Nybble, hub: Hub, data: Path, adapter: Path) -> None:
    def loss(*model: object) -> float:
        given = ("--adapter", adapter, "--data", data, "--set", "data.max_length=64", "--json")
        return float(json.loads(nybble("eval", *given, *model).stdout)["loss"])

    assert loss() == loss("--model", hub["v1.0"]) != loss("--model", hub[None])


def test_chat_does_so_too(nybble: Nybble, hub: Hub, adapter: Path) -> None:
    def answer(*model: object) -> str:
        given = ("--adapter", adapter, "--prompt", "What is train 1?", "--max-new-tokens", 8)
        return nybble("chat", *given, *model).stdout

    assert answer() == answer("--model", hub["v1.0"]) != answer("--model", hub[None])


def test_a_run_writes_its_revision(nybble: Nybble, data: Path, tmp_path: Path) -> None:
    given = ("--model", "org/model", "--data", data, "--set", "model.revision=v1.0", "--output", tmp_path / "run")
    nybble("train", *given, *SMALL)
    saved = read_adapter(tmp_path / "run")
    assert json.loads((saved.folder / "adapter_config.json").read_text())["revision"] == "v1.0"
    assert saved.provenance is not None
    assert (saved.revision, saved.provenance.revision) == ("v1.0", "v1.0")
    nybble("merge", "--adapter", tmp_path / "run", "--output", tmp_path / "merged")


def test_a_difference_is_of_the_revision_that_its_base_was_made_of(nybble: Nybble, data: Path, tmp_path: Path) -> None:
    calibration = Calibration(CalibrationText(tokens(), "random"), rank=4)
    original = Checkpoint.open("org/model", "v1.0")
    quantize_checkpoint(original, tmp_path / "nf4", NF4Spec(), calibration=calibration, device=CPU)
    begun = ("--model", tmp_path / "nf4", "--data", data, "--set", "lora.init=calibrated", "--set", "lora.r=4")
    nybble("train", *begun, *SMALL, "--output", tmp_path / "run")
    nybble("difference", "--adapter", tmp_path / "run", "--output", tmp_path / "difference")
    saved = read_adapter(tmp_path / "difference")
    assert saved.provenance is not None
    assert (saved.base_model_name, saved.revision) == ("org/model", "v1.0")
    assert (saved.provenance.base, saved.provenance.revision) == ("org/model", "v1.0")


def test_what_a_merge_is_measured_against_is_the_prepared_base_at_its_revision(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Provenance(
        base="org/prepared", revision="r64", base_fingerprint="0" * 64, storage="nf4", calibration="a text"
    ).write(adapter)
    asked: list[ModelConfig] = []

    class Asked(Exception):
        pass

    def load(model: ModelConfig, *_: object) -> None:
        asked.append(model)
        raise Asked

    monkeypatch.setattr(merge_check, "load_for_inference", load)
    with pytest.raises(Asked):
        merge_check.measure_on(ModelConfig(name="org/model", revision="v1.0"), adapter, [], batch_size=1)
    assert [(model.name, model.revision) for model in asked] == [("org/prepared", "r64")]
