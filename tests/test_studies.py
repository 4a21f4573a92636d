"""The study's grid, and that its parts are trained, kept, restored and told of."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from nybble.adapters.config import LoraConfig
from nybble.adapters.inject import inject
from nybble.adapters.io import save_adapter
from nybble.compare.result import Machine
from nybble.demo.splits import Splits
from nybble.errors import UserError
from nybble.models.config import ModelConfig
from nybble.models.load import load_model
from tests.adapters.support import CPU, randomized

ROOT = Path(__file__).parents[1]
MACHINE = Machine("cuda", "a card", 80 * 2**30, 16, {})


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(ROOT / "studies")


@pytest.fixture
def work(tmp_path: Path, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    import parts

    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "model").symlink_to(tiny("smollm", dtype="bfloat16"), target_is_directory=True)
    rows = [[{"text": f"Row {name} {i} of several. " * 6} for i in range(6)] for name in "abc"]
    monkeypatch.setitem(parts.KINDS, "text", lambda: Splits(*rows))
    return folder


def small_part(**changes: Any) -> Any:
    from grid import Data, Part

    arms = {"base": {"method": "base"}, "lora": {"method": "lora"}, "qlora": {"method": "qlora"}}
    data = Data("text", steps=2, batch_size=1, validation_rows=3, test_rows=4)
    return Part("quality-text", data, arms, **{"r": 4, "seeds": 2, "rates": (1e-3, 1e-2)} | changes)


def finish(part: Any, work: Path, kept: Path) -> Any:
    from parts import begin, jobs_of, keep, layout_of

    layout = layout_of(part, work)
    begin(layout, kept)
    for job in jobs_of(part, layout):
        job.function(*job.arguments)
    return keep(layout, kept, MACHINE)


def chosen_with_seed(layout: Any, arm: str, seed: int) -> list[str]:
    runs = layout.results(next(one for one in layout.compare.arms if one.name == arm))
    return [str(run.folder.path.relative_to(layout.output / arm)) for run in runs if run.config.train.seed == seed]


def test_every_arm_of_the_grid_has_valid_settings(work: Path) -> None:
    from grid import grid, small
    from parts import KINDS, layout_of

    every = grid("prepared/{}".format)
    assert len({part.name for part in every}) == len(every)
    for part in [*every, *small(every)]:
        assert part.data.kind in KINDS
        if part.data.kind == "text":
            layout = layout_of(part, work)
            assert all(arm.config(layout.shared).model.name for arm in layout.compare.arms)
            assert layout.compare.reference_name == "lora"


def test_runs_are_counted_as_they_are_planned(work: Path) -> None:
    from parts import layout_of

    part = small_part()
    layout = layout_of(part, work)
    assert part.runs == sum(len(layout.sweep(arm)) + len(layout.seeds) - 1 for arm in layout.compare.trained) == 6


def test_the_process_that_hands_out_jobs_asks_for_no_gpu(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train_grid
    from jobs import Job

    def run_here(jobs: Any, *_: Any, imported: Any, **__: Any) -> Any:
        assert "nybble.compare.worker" in imported
        return [{"row": job.name, "seconds": 1.0, "machine": MACHINE} for job in jobs]

    def refuse() -> None:
        raise AssertionError("it would have memory of the GPU")

    monkeypatch.setattr(train_grid, "run_jobs", run_here)
    monkeypatch.setattr("nybble.compare.assemble.this_machine", refuse)
    [found] = train_grid.needed([Job("machine", refuse)], [0])
    train_grid.train([small_part()], work, [0], tmp_path, time.monotonic() + 60, found["machine"])
    assert json.loads((tmp_path / "quality-text.json").read_text())["device"] == "a card"


def test_a_part_is_kept_and_another_machine_goes_on_from_it_where_it_is_whole(work: Path, tmp_path: Path) -> None:
    from parts import begin, jobs_of, layout_of

    part, kept = small_part(), tmp_path / "kept" / "quality-text.json"
    first = finish(part, work, kept)
    assert [arm.status for arm in first.arms] == ["finished"] * 3
    assert first.machine == MACHINE
    assert json.loads(kept.read_text())["device"] == "a card"
    found = first.difference("qlora")
    assert found is not None
    assert found.seeds == (0, 1)
    assert not {"curve", "sequence_losses"} & set(json.loads(kept.read_text())["comparison"]["arms"][1]["runs"][0])

    shutil.rmtree(work / part.name)
    again = finish(part, work, kept)
    assert again.difference("qlora").mean == pytest.approx(found.mean, rel=1e-6)
    assert again.statement == first.statement
    layout = layout_of(part, work)
    assert jobs_of(part, layout) == []

    # A result that was trained but not measured needs its adapter, which is gone; rates that lost do not.
    values = json.loads(kept.read_text())
    unmeasured = {f"{arm}/{name}" for arm in ("lora", "qlora") for name in chosen_with_seed(layout, arm, 1)}
    for name in unmeasured:
        values["records"][name]["measured"] = None
    kept.write_text(json.dumps(values))
    shutil.rmtree(work / part.name)
    begin(layout, kept)
    restored = {str(run.folder.path.relative_to(layout.output)) for run in layout.all_runs() if run.folder.begun}
    assert restored == set(values["records"]) - unmeasured


def test_a_page_tells_which_arms_are_unfinished_and_how_rows_were_answered(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import parts
    from claims import Results
    from grid import Data
    from write_study import page

    rows = [[{"prompt": f"What is {name} {i}?", "completion": f"{i}"} for i in range(6)] for name in "abc"]
    monkeypatch.setitem(parts.KINDS, "words", lambda: Splits(*rows))
    data = Data("words", 2, 1, validation_rows=3, test_rows=4, questions=2, answer_tokens=3)
    part = replace(small_part(rates=(1e-3,), seeds=1), name="quality-words", data=data)
    kept = tmp_path / "study" / "quality-words.json"
    comparison = finish(part, work, kept)
    score = comparison.arm("lora").score("ROUGE-L")
    assert score is not None
    text = page(Results(tmp_path))
    assert f"| {score.value:.3f} [{score.interval.low:.3f}, {score.interval.high:.3f}], 2 rows |" in text
    values = json.loads(kept.read_text())
    values["comparison"]["arms"][2]["status"] = "unfinished"
    kept.write_text(json.dumps(values))
    assert "(quality-words); unfinished are quality-words: qlora." in page(Results(tmp_path))


def test_a_part_begun_with_other_settings_is_refused_and_half_written_rows_are_written_anew(
    work: Path, tmp_path: Path
) -> None:
    from parts import begin, layout_of, write_data

    part, kept = small_part(), tmp_path / "kept.json"
    (work / "data" / "text-3-4").mkdir(parents=True)
    (work / "data" / "text-3-4" / "train.jsonl").write_text("half a li")
    assert len((write_data(part, work) / "train.jsonl").read_text().splitlines()) == 6
    layout = layout_of(part, work)
    begin(layout, kept)
    layout.all_runs()[1].folder.begin()
    with pytest.raises(UserError, match="begun with other settings, rows or weights"):
        begin(layout_of(replace(part, r=8), work), kept)


def test_a_part_goes_on_from_a_base_that_was_prepared_again_and_from_no_other_model(work: Path, tmp_path: Path) -> None:
    from parts import begin, layout_of

    prepared = work / "prepared" / "text"
    shutil.copytree(work / "model", prepared)
    arms = {"lora": {"method": "lora"}, "prepared": {"method": "lora", "model.name": str(prepared)}}
    part, kept = replace(small_part(seeds=1, rates=(1e-3,)), arms=arms), tmp_path / "kept.json"
    finish(part, work, kept)

    def other_weights(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})

    other_weights(prepared)
    shutil.rmtree(work / part.name)
    layout = layout_of(part, work)
    begin(layout, kept)
    assert all(run.folder.begun for run in layout.all_runs())

    shutil.copytree(work / "model", tmp_path / "other")
    other_weights(tmp_path / "other")
    (work / "model").unlink()
    (work / "model").symlink_to(tmp_path / "other", target_is_directory=True)
    shutil.rmtree(work / part.name)
    with pytest.raises(UserError, match=r"lora/lr-0\.001/seed-0: base weights"):
        begin(layout_of(part, work), kept)


@pytest.mark.usefixtures("work")
def test_kept_results_name_no_place_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "quality-text.json"
    finish(small_part(seeds=1, rates=(1e-3,)), Path("work"), kept)
    values = json.loads(kept.read_text())
    assert str(tmp_path) not in json.dumps({"comparison": values["comparison"], "records": values["records"]})


def test_page_tells_what_was_kept_and_what_is_missing(work: Path, tmp_path: Path) -> None:
    from claims import Results
    from write_study import page

    kept = tmp_path / "study" / "quality-text.json"
    comparison = finish(small_part(rates=(1e-3,)), work, kept)
    row = {"weights": "normal", "linears": 1, "format": "nf4", "rounding": "nearest", "block_size": 64}
    rows = [
        row | {"double_quant": d, "bits_per_weight": 4.5 - 0.373 * d, "relative_error": 0.09} for d in (False, True)
    ]
    origin = {"device": "a card", "versions": {"torch": "2.13"}, "date": "2026-11-29", "command": "python formats.py"}
    (tmp_path / "study" / "formats.json").write_text(json.dumps(origin | {"rows": rows}))
    losses = {"none": 2.0, "nearest": 3.0, "compensated": 2.25}
    codes = [
        {"rounding": name, "rank": 0, "loss": {"python": loss}, "closed": {"python": 3.0 - loss}}
        for name, loss in losses.items()
    ]
    kept_codes = origin | {"rows": codes, "calibration": {"tokens": 4096}}
    (tmp_path / "study" / "rounding.json").write_text(json.dumps(kept_codes))
    merges = [
        {"base": "as it was trained", "rounding": None, "loss": 2.0},
        {"base": "dequantized", "rounding": None, "loss": 2.01, "above": 0.0, "share": 0.0},
        {"base": "original", "rounding": "search", "loss": 2.02, "above": 0.01, "share": 0.25},
    ]
    kept_merges = origin | {"rows": merges, "calibration": {"tokens": 8192, "rows": "training rows"}}
    (tmp_path / "study" / "merge.json").write_text(json.dumps(kept_merges))
    base = {"what": "scales tuned", "divergence": 0.04, "divergence_adapted": None, "loss_before": 2.5}
    trial = origin | {"rows": [base | {"losses_after": [2.03, 2.01]}], "losses_of_lora": [2.0, 2.0]}
    trial |= {"calibration": {"tokens": 1024, "rows": "rows"}, "learning_rate": 0.004}
    (tmp_path / "study" / "tried_tuning.json").write_text(json.dumps(trial))
    cost = {"model": "8B", "tokens": 65536, "seconds": 240.0, "peak_gib": 11.0, "bits_per_weight": 4.127}
    (tmp_path / "study" / "quantize_8b.json").write_text(json.dumps(origin | {"rows": [cost]}))
    rows = {"one long, paged, within the budget": (1.0, 9.0), "one long, resident": (1.0, 8.0)}
    rows |= {"all long, paged, within the budget": (2.2, 2.2), "all long, resident": (2.0, 2.0)}
    spikes = [{"row": row, "short_step_s": short, "long_step_s": long} for row, (short, long) in rows.items()]
    (tmp_path / "memory_paging.json").write_text(json.dumps({"rows": spikes}))
    text = page(Results(tmp_path))
    assert "| 8B | 65,536 | 4.0 | 11.0 | 4.127 |" in text
    assert "a short step takes 1.000 of the time and one that pages 1.100" in text
    assert "| scales tuned | 0.0400 | - | 2.5000 | +0.0200 |" in text
    assert "| original | search | 2.0200 | +0.0100 | 25% |" in text
    assert "| as it was trained | 16 bit | 2.0000 | - | - |" in text
    assert "on 4,096 tokens of text" in text
    assert "| compensated | - | - | 2.2500 | 75% |" in text
    difference, lora = comparison.difference("qlora"), comparison.arm("lora")
    assert difference is not None
    assert lora.loss_after is not None
    assert f"{difference.mean:+.4f} [{difference.interval.low:+.4f}, {difference.interval.high:+.4f}], 2 seeds" in text
    assert f"| lora | {lora.trainable:,} | 0.001 | {lora.loss_after:.4f}" in text
    assert f"qlora {difference.mean / lora.loss_after:+.2%} ({difference.verdict})" in text
    assert "| 5 | Double quantization saves ~0.5 bit | 0.373 bit (4.500 to 4.127) |" in text
    assert "No run failed." in text
    assert "**Made so far:** 1 of the 10 parts of the grid (quality-text); the errors of 4-bit formats on" in text
    assert "a card, torch 2.13, 2026-11-29, by `python formats.py`." in text
    assert "## Quality on words, r=16 on all linear layers\n\n*Not measured yet.*" in text


def test_a_merge_in_four_bits_is_measured_beside_plain_requantization(
    tiny: Callable[..., Path], hub: dict[str | None, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import merge_to_nf4

    hub["in-16-bits"] = tiny("llama", dtype="bfloat16")
    loaded = load_model(ModelConfig(name="org/model", revision="in-16-bits", storage="nf4"), device=CPU)
    inject(loaded.model, LoraConfig(r=4))
    randomized(loaded.model)
    save_adapter(loaded.model, tmp_path / "adapter", provenance=loaded.provenance)
    rows = [{"text": f"Row {i} of several. " * 20} for i in range(12)]
    Splits(rows[:8], [], rows[8:]).write(tmp_path / "data")
    arguments = ["--adapter", str(tmp_path / "adapter"), "--data", str(tmp_path / "data"), "--tokens", "256"]
    monkeypatch.setattr("sys.argv", ["merge_to_nf4.py", *arguments, "--output", str(tmp_path / "merge.json")])
    merge_to_nf4.main()
    kept = json.loads((tmp_path / "merge.json").read_text())
    found = {(row["base"], row["rounding"]): row for row in kept["rows"]}
    whole, plain = found["dequantized", None], found["dequantized", "nearest"]
    assert (whole["share"], plain["share"]) == (0, 1)
    assert whole["loss"] == pytest.approx(found["as it was trained", None]["loss"], abs=1e-3)
    assert len({row["loss"] for row in kept["rows"]}) == 1 + len(merge_to_nf4.CASES)
    again = found["original", "search"]
    assert again["share"] * (plain["loss"] - whole["loss"]) == pytest.approx(again["loss"] - whole["loss"])


@pytest.mark.usefixtures("hub")
def test_a_token_is_timed_with_an_adapter_beside_its_model_and_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import merged_speed
    from claims import Results, latency

    loaded = load_model(ModelConfig(name="org/model", revision="v1.0", storage="fp32"), device=CPU)
    inject(loaded.model, LoraConfig(r=4))
    randomized(loaded.model)
    save_adapter(loaded.model, tmp_path / "adapter", provenance=loaded.provenance)
    monkeypatch.setattr(merged_speed, "VOCABULARY", 30)
    output = tmp_path / "study" / "merged_speed.json"
    arguments = ["--adapter", str(tmp_path / "adapter"), "--output", str(output)]
    monkeypatch.setattr("sys.argv", ["merged_speed.py", *arguments])
    merged_speed.main()
    kept = json.loads(output.read_text())
    assert kept["largest_logit_gap"] < 1e-3
    assert [row["ratio"] > 0 for row in kept["rows"]] == [True] * 3
    merged = next(row["ratio"] for row in kept["rows"] if row["model"] == "with the adapter merged")
    assert latency(Results(tmp_path))[0].startswith(f"a token takes {merged:.2f} of the base's time")


def test_a_sweep_says_where_its_best_is_the_last_that_was_tried() -> None:
    from write_study import at_the_edge

    def told(*losses: float | None) -> str:
        return at_the_edge({"sweep": [{"learning_rate": 10.0**n, "loss": loss} for n, loss in enumerate(losses)]})

    assert told(2.0, 1.0, 3.0) == told(1.0) == told(None, None) == ""
    assert told(1.0, 2.0, 3.0) == " (best at the lowest)"
    assert told(2.0, 1.0, None) == " (best at the highest)"


def test_page_is_up_to_date() -> None:
    from claims import Results
    from write_study import PAGE, RESULTS, page

    assert PAGE.read_text(encoding="utf-8") == page(Results(RESULTS)), "run: python3 studies/write_study.py"


def test_formats_err_less_in_nf4_on_normal_weights() -> None:
    import formats
    import torch

    weight = torch.randn(256, 256)
    case = formats.Case("nf4", "nearest", 64, True)
    found = formats.errors_of([(weight, case.quantize(weight))])
    expected = (case.quantize(weight).dequantize(torch.float32) - weight).norm() / weight.norm()
    assert found["relative_error"] == pytest.approx(expected.item(), rel=1e-5)
    assert found["linears"] == 1
    assert found["bits_per_weight"] == pytest.approx(4 + 8 / 64 + 32 / (64 * 256) + 32 / weight.numel())


def test_formats_leave_quantized_weights_in_the_model_and_restore_them() -> None:
    import formats
    import torch

    weights = [torch.randn(8, 64), torch.randn(4, 64)]
    originals = [weight.clone() for weight in weights]
    case = formats.Case("fp4", "nearest", 64, False)
    formats.errors_of(formats.replaced(weights, case.quantize))
    for weight, original in zip(weights, originals, strict=True):
        assert torch.equal(weight, case.quantize(original).dequantize(torch.float32))
    formats.restore(weights, originals)
    assert all(map(torch.equal, weights, originals))
