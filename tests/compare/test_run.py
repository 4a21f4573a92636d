"""Comparisons of real arms on a tiny model."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from nybble.calibrate.run import Calibration
from nybble.calibrate.text import CalibrationText
from nybble.compare import peaks
from nybble.compare.assemble import assemble
from nybble.compare.config import Arm, CompareConfig, read_arms
from nybble.compare.folder import Failure
from nybble.compare.layout import Layout, PlannedRun
from nybble.compare.result import Comparison, read_comparison
from nybble.compare.run import compare_arms, settle_changes
from nybble.compare.statement import state
from nybble.compare.worker import Worker, is_finished, run_arms
from nybble.config import RunConfig
from nybble.errors import UserError
from nybble.evaluation.held_out import HeldOut, held_out_examples, measure_held_out
from nybble.export.quantized import quantize_checkpoint
from nybble.inference import load_for_inference
from nybble.models.checkpoint import Checkpoint
from nybble.quant.format import NF4Spec
from nybble.train.run import run_training


@pytest.fixture
def config(tiny: Callable[..., Path], tmp_path: Path) -> RunConfig:
    data = tmp_path / "data"
    data.mkdir()
    for name, count in (("train", 8), ("valid", 5)):
        rows = [{"prompt": f"What is {name} {i}?", "completion": f"It is the number {i}."} for i in range(count)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model.name": str(tiny("smollm", dtype="bfloat16")),
        "data.path": str(data),
        "data.max_length": 64,
        "output": str(tmp_path / "out"),
        "train.max_steps": 2,
        "optim.learning_rate": 0.01,
    }
    return RunConfig.read(None, settings)


def with_settings(config: RunConfig, **changes: object) -> RunConfig:
    names = {name.replace("__", "."): value for name, value in changes.items()}
    return RunConfig.read(None, config.model_dump(mode="json") | names)


def run_here(config: RunConfig, compare: CompareConfig) -> Comparison:
    """As `compare_arms`, in this process; arms that may not share a base come one after another."""
    output = Path(config.output)
    output.mkdir(exist_ok=True)
    layout = Layout(config, compare, output)
    for arm in compare.arms:
        run_arms(layout, [arm], quiet=True)
    return assemble(layout, state(layout, replaced=True))


def held_out(config: RunConfig, adapter: Path | None = None) -> HeldOut:
    examples = held_out_examples(config.model, adapter, config.data)
    return measure_held_out(load_for_inference(config.model, adapter), examples)


def test_every_arm_is_measured_on_the_same_rows(config: RunConfig) -> None:
    found = run_here(config, read_arms("base,lora,qlora,full"))
    base, lora, qlora, full = found.arms
    rows = held_out(config)
    assert base.loss_before == base.loss_after == lora.loss_before == pytest.approx(rows.loss, rel=1e-6)
    assert full.loss_before == pytest.approx(rows.loss, rel=1e-3)  # its weights are fp32 copies of bf16 ones
    assert qlora.loss_before not in (None, lora.loss_before)
    assert [arm.storage for arm in found.arms] == ["bf16", "bf16", "nf4", "fp32"]
    assert (base.trainable, base.steps, base.learning_rate) == (0, 0, None)
    for arm in (lora, qlora, full):
        (run,) = arm.finished
        assert run.loss is not None
        assert run.loss < run.loss_before
        assert run.steps == 2
        assert len(run.sequence_losses) == found.test.rows == 5
        assert sum(run.sequence_losses) / sum(found.test.target_tokens) == run.loss
        assert [phase.phase for phase in run.memory] == ["load", "train", "evaluate"]
    assert [(found.arm, found.reference) for found in found.differences] == [("qlora", "lora"), ("full", "lora")]


def test_the_loss_is_that_of_what_was_saved(config: RunConfig) -> None:
    found = run_here(config, read_arms("qlora"))
    (run,) = found.arm("qlora").runs
    saved = held_out(config, Path(config.output) / run.folder)
    assert run.loss == pytest.approx(saved.loss, rel=1e-6)
    file = Path(config.output) / run.folder / "adapter" / "adapter_model.safetensors"
    assert found.arm("qlora").disk_bytes == file.stat().st_size > 4 * found.arm("qlora").trainable


def test_runs_over_one_base_are_those_of_a_base_of_their_own(config: RunConfig) -> None:
    arms = {"lora": {"lora.r": 2}, "wide": {"lora.r": 8}}
    compare = CompareConfig(arms=tuple(Arm(name=name, overrides=given) for name, given in arms.items()), seeds=2)
    lora = with_settings(config, method="lora")
    layout = Layout(lora, compare, Path(config.output))
    run_arms(layout, compare.arms, quiet=True)  # four runs, one process, one base
    for run in layout.all_runs():
        alone = Path(config.output) / "alone" / run.arm.name / str(run.config.train.seed)
        result = run_training(run.config.model_copy(update={"output": str(alone)}), quiet=True)
        shared = json.loads((run.folder.path / "run.json").read_text())
        assert tuple(shared["losses"]) == result.losses
    seeds = [run.folder.trained.curve.losses for run in layout.runs_of(compare.arms[0]) if run.folder.trained]
    assert seeds[0] != seeds[1]


def test_an_adapter_that_begins_elsewhere_is_measured_on_the_base_that_it_belongs_to(config: RunConfig) -> None:
    arms = {"plain": {"method": "lora"}, "pissa": {"method": "lora", "lora.init": "pissa"}}
    found = run_here(config, CompareConfig(arms=tuple(Arm(name=name, overrides=given) for name, given in arms.items())))
    plain, pissa = found.arms
    # What PiSSA takes out of the weights its adapter begins with: the model is the same but for bf16's rounding.
    assert pissa.loss_before == pytest.approx(plain.loss_before, rel=1e-2)
    assert pissa.loss_before != plain.loss_before
    assert pissa.loss_after < pissa.loss_before
    assert pissa.runs[0].curve.losses[0] == pytest.approx(plain.runs[0].curve.losses[0], rel=1e-2)


def test_the_best_learning_rate_by_validation_rows_is_used_for_every_seed(config: RunConfig) -> None:
    compare = read_arms("lora", {"learning_rates": [1e-6, 0.02], "seeds": 2})
    found = run_here(config, compare)
    lora = found.arm("lora")
    assert [point.learning_rate for point in lora.sweep] == [1e-6, 0.02]
    assert all(point.seed == 0 for point in lora.sweep)
    assert lora.sweep[1].loss < lora.sweep[0].loss
    assert lora.learning_rate == 0.02
    assert [run.folder for run in lora.runs] == ["lora/lr-0.02/seed-0", "lora/lr-0.02/seed-1"]
    # The first, third and fifth row chose; the others are what no choice has seen.
    assert (found.validation.rows, found.test.rows) == (3, 2)
    assert not (Path(config.output) / "lora/lr-1e-06/seed-1").exists()
    unchosen = json.loads((Path(config.output) / "lora/lr-1e-06/seed-0/compare.json").read_text())
    assert "measured" not in unchosen
    assert found.seconds > sum(run.seconds for run in lora.runs)


def test_a_run_from_before_there_was_a_choice_is_evaluated_and_may_win(config: RunConfig) -> None:
    both = read_arms("lora,full", {"learning_rates": [1e-6, 0.02], "samples": 0})
    fresh = run_here(with_settings(config, output=f"{config.output}-fresh"), both)
    run_here(config, read_arms("lora,full", {"learning_rates": [0.02], "samples": 0}))
    folders = [Path(config.output) / arm / "lr-0.02/seed-0" for arm in ("lora", "full")]
    assert [json.loads((folder / "run.json").read_text())["evaluations"] for folder in folders] == [[], []]
    written = [(folder / "log.jsonl").stat().st_mtime_ns for folder in folders]
    layout = Layout(config, both, Path(config.output))
    assert not any(is_finished(layout, arm) for arm in both.arms)
    assert assemble(layout, state(layout)).arm("lora").sweep == ()
    found = run_here(config, both)
    assert [(folder / "log.jsonl").stat().st_mtime_ns for folder in folders] == written  # not trained again
    assert all(is_finished(layout, arm) for arm in both.arms)
    for arm, other in zip(found.arms, fresh.arms, strict=True):
        assert arm.learning_rate == other.learning_rate == 0.02
        losses = [point.loss for point in other.sweep]
        assert [point.loss for point in arm.sweep] == [pytest.approx(loss, rel=1e-3) for loss in losses]
        assert arm.loss_after == pytest.approx(other.loss_after, rel=1e-6)


def test_a_test_file_gives_the_results(config: RunConfig, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is test {i}?", "completion": f"The number {i}."} for i in range(3)]
    rows.append({"prompt": "What is train 0?", "completion": "It is the number 0."})
    (tmp_path / "data" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = run_here(with_settings(config, train__eval_every=1), read_arms("lora"))
    assert (found.validation.rows, found.test.rows, found.test.duplicates) == (5, 4, 1)
    assert found.test.source.endswith("test.jsonl")
    curve = found.arm("lora").runs[0].curve
    assert curve.validation_steps == (0, 1, 2)
    assert curve.tokens[1] > curve.tokens[0] > 0


def test_every_run_answers_the_same_questions_and_is_scored(config: RunConfig) -> None:
    # Answers are learned by heart: those of the held-out rows are those of the training rows.
    rows = [{"prompt": f"What is {i}?", "completion": "It is odd."} for i in range(6)]
    for name in ("train", "valid"):
        (Path(config.data.path) / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    learned = with_settings(config, train__max_steps=120, optim__learning_rate=0.01)
    found = run_here(learned, read_arms("base,lora", {"samples": 4, "sample_tokens": 16, "seeds": 2}))
    assert len(found.samples) == 4
    for number, sample in enumerate(found.samples):
        assert sample.prompt.endswith(f"What is {number}?\nassistant")
        assert (sample.expected, sample.answers["lora"]) == ("It is odd.", "It is odd.")
        assert sample.answers["base"] != sample.expected
    base, lora = found.arms
    assert found.score_names == ("exact match", "ROUGE-L")
    assert [run.scores["exact match"] for run in lora.runs if run.scores] == [1.0, 1.0]
    match, base_match = lora.score("exact match"), base.score("exact match")
    assert match is not None
    assert base_match is not None
    over = "Wilson's interval over 4 questions"  # the seeds agree
    assert (match.value, match.questions, match.interval.how) == (1.0, 4, over)
    assert (base_match.value, base_match.interval.how) == (0.0, over)
    assert base.score("ROUGE-L").value < 0.5 < lora.score("ROUGE-L").value  # type: ignore[union-attr]


def test_texts_are_gone_on_with_and_not_scored(config: RunConfig) -> None:
    rows = [{"text": f"This is text {i} of several, and it goes on for a while."} for i in range(8)]
    for name in ("train", "valid"):
        (Path(config.data.path) / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = run_here(config, read_arms("base,lora", {"sample_tokens": 4}))
    assert len(found.samples) == 5  # as many as are shown
    first = found.samples[0]
    assert f"{first.prompt} {first.expected}".replace(" ", "") == rows[0]["text"].replace(" ", "")
    assert all(arm.scores == () and arm.runs[0].scores is None for arm in found.arms)


def test_other_test_rows_are_measured_anew_and_nothing_of_the_earlier_ones_is_told(
    config: RunConfig, tmp_path: Path
) -> None:
    given = {
        "rounding": "nearest",
        "calibration": Calibration(CalibrationText(torch.randint(4, 40, (6, 24)), "random")),
    }
    base = Checkpoint.open(config.model.name)
    quantize_checkpoint(base, tmp_path / "prepared", NF4Spec(), device=torch.device("cpu"), **given)
    arms = {
        "lora": {"method": "lora"},
        "pissa": {"method": "lora", "lora.init": "pissa"},
        "calibrated": {"method": "qlora", "model.name": str(tmp_path / "prepared"), "lora.init": "calibrated"},
    }
    compare = CompareConfig(arms=tuple(Arm(name=name, overrides=given) for name, given in arms.items()), samples=0)
    first = run_here(config, compare)
    (tmp_path / "other.jsonl").write_text('{"prompt": "And now?", "completion": "Something else."}\n')
    other = compare.model_copy(update={"test": str(tmp_path / "other.jsonl")})
    # By now, before anything is measured on them:
    layout = Layout(config, other, Path(config.output))
    unfinished = assemble(layout, state(layout))
    assert [arm.status for arm in unfinished.arms] == ["unfinished"] * 3
    assert unfinished.test.rows == 0
    again = run_here(config, other)
    assert again.test.rows == 1
    assert again.arm("lora").loss_after != first.arm("lora").loss_after
    assert again.arm("lora").loss_before not in (None, first.arm("lora").loss_before)
    # What the others began with is gone, and the base alone is not it.
    for arm in ("pissa", "calibrated"):
        assert first.arm(arm).loss_before is not None
        assert again.arm(arm).loss_before is None
        assert again.arm(arm).loss_after is not None


def test_what_is_done_is_told_and_so_is_measuring_alone(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    compare = read_arms("lora", {"samples": 2})
    layout = Layout(config, compare, Path(config.output))
    run_arms(layout, compare.arms)
    told = capsys.readouterr().err
    for line in ("arm lora", "step 1/2", "seed 0: measuring 5 test rows after training", "held-out loss "):
        assert line in told
    assert "ROUGE-L " in told
    (run,) = layout.runs_of(compare.arms[0])
    kept = json.loads((run.folder.path / "compare.json").read_text())
    (run.folder.path / "compare.json").write_text(json.dumps(kept | {"measured": None}))  # killed as it was measured
    run_arms(layout, compare.arms)
    told = capsys.readouterr().err
    assert "step 1/2" not in told
    assert "seed 0: measuring 5 test rows after training" in told


def test_merging_is_measured_and_leaves_no_model_behind(config: RunConfig) -> None:
    found = run_here(config, read_arms("lora,qlora,full", {"merge": True}))
    assert [merge.base for merge in found.arm("lora").merges] == ["original"]
    assert {merge.base for merge in found.arm("qlora").merges} == {"original", "dequantized"}
    assert found.arm("full").merges == ()
    for arm in ("lora", "qlora"):
        (run,) = found.arm(arm).runs
        assert all(merge.adapter_loss == pytest.approx(run.loss, rel=1e-5) for merge in found.arm(arm).merges)
    assert not list(Path(config.output).rglob("merged"))


def test_an_arm_that_fails_is_reported_and_the_others_go_on(config: RunConfig) -> None:
    arms = {"bad": {"method": "lora", "lora.target_modules": ["nothing"]}, "good": {"method": "lora"}}
    compare = CompareConfig(arms=tuple(Arm(name=name, overrides=given) for name, given in arms.items()))
    layout = Layout(config, compare, Path(config.output))
    run_arms(layout, compare.arms, quiet=True)
    found = assemble(layout, state(layout))
    assert [arm.status for arm in found.arms] == ["failed", "finished"]
    assert "nothing" in found.arm("bad").error
    # It may be tried again, where a loss that is not finite may not.
    (run,) = layout.runs_of(compare.arms[0])
    assert is_finished(layout, compare.arms[0])
    run.folder.forgive()
    assert not is_finished(layout, compare.arms[0])
    run.folder.fail(Failure("the loss is nan", "step 3", lasting=True))
    run.folder.forgive()
    assert is_finished(layout, compare.arms[0])


def test_a_held_out_loss_that_is_not_finite_fails_its_arm_alone(
    config: RunConfig, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    _make_token_too_large_for_fp16(model, "Z")
    held_out = Path(config.data.path) / "valid.jsonl"
    good = held_out.read_text()
    held_out.write_text(good + '{"prompt": "What is Z?", "completion": "A letter."}\n')
    half = {"model.name": str(model), "model.compute": "fp16"}
    arms = {"base": half | {"method": "base"}, "half": half | {"method": "lora"}, "whole": {"method": "lora"}}
    compare = CompareConfig(
        arms=tuple(Arm(name=name, overrides=given) for name, given in arms.items()), seeds=2, samples=0
    )
    shared = with_settings(config, model__name=str(model))
    found = run_here(shared, compare)
    assert [arm.status for arm in found.arms] == ["failed", "failed", "finished"]
    for arm in ("base", "half"):
        assert found.arm(arm).error == "test rows: the held-out loss is nan: it is not finite on 1 of 6 rows"
    assert len(found.arm("whole").finished) == 2
    # An earlier version kept such a loss: it is no result, and is measured anew.
    layout = Layout(shared, compare, Path(config.output))
    record = Path(config.output) / "whole/seed-1/compare.json"
    kept = json.loads(record.read_text())
    kept["measured"]["sums"][-1] = math.nan
    record.write_text(json.dumps(kept))
    assert assemble(layout, state(layout)).arm("whole").status == "unfinished"
    # Other rows may have a loss that is finite: the next call measures again, and trains nothing.
    held_out.write_text(good)
    log = Path(config.output) / "half/seed-0/log.jsonl"
    written = log.stat().st_mtime_ns
    for run in layout.all_runs():
        run.folder.forgive()
    assert [arm.status for arm in run_here(shared, compare).arms] == ["finished"] * 3
    assert log.stat().st_mtime_ns == written


def _make_token_too_large_for_fp16(model: Path, token: str) -> None:
    (number,) = AutoTokenizer.from_pretrained(model)(token, add_special_tokens=False).input_ids
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][number] = 1e5
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def test_arms_run_in_processes_and_finished_ones_are_kept(config: RunConfig) -> None:
    compare = read_arms("base,lora")
    first = compare_arms(config, compare, quiet=True, command="nybble compare")
    log = Path(config.output) / "lora/seed-0/log.jsonl"
    written = log.stat().st_mtime_ns
    again = compare_arms(config, compare, quiet=True)
    assert again.arms == first.arms
    assert log.stat().st_mtime_ns == written
    assert read_comparison(Path(config.output)) == again
    told = json.loads((Path(config.output) / "comparison.json").read_text())["verdict"]
    assert (told["choice"], told["headline"]) == (None, "Only lora has a result.")
    assert told["because"] in (Path(config.output) / "report.md").read_text()
    assert (first.command, first.statement.reference, again.statement) == ("nybble compare", "lora", first.statement)
    more = compare_arms(config, read_arms("base,lora", {"seeds": 2}), quiet=True)
    assert more.arm("lora").runs[0] == first.arm("lora").runs[0]
    assert len(more.arm("lora").finished) == 2
    assert "seeds were [0] and are [0, 1]" in more.statement.changes[0]
    assert more.statement.stated_at == first.statement.stated_at


def test_a_margin_is_not_moved_after_results(config: RunConfig) -> None:
    run_here(config, read_arms("base"))
    with pytest.raises(UserError, match=r"margin was 0\.01 and is 0\.5"):
        compare_arms(config, read_arms("base", {"margin": 0.5}), quiet=True)
    with pytest.raises(UserError, match=r"margin was 0\.01 and is 0\.5"):  # nor by arms that have none yet
        compare_arms(config, read_arms("lora", {"margin": 0.5}), quiet=True)


def test_an_arm_whose_process_is_killed_is_given_up_alone(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nybble.compare import run as module

    monkeypatch.setattr(module, "run_arms", _killed_in_lora)
    found = compare_arms(config, read_arms("base,lora"))
    assert [arm.status for arm in found.arms] == ["finished", "failed"]
    assert "ended from outside" in found.arm("lora").error
    assert "failed: lora, learning rate 0.01, seed 0: its process was ended from outside" in capsys.readouterr().err


def _killed_in_lora(layout: Layout, arms: list[Arm], *, quiet: bool) -> None:
    """What the system does when memory runs out, in the process of arms."""
    for run in layout.runs_of(arms[-1]):
        if run.folder.failure is None:
            run.folder.begin()
            os._exit(9)
    run_arms(layout, arms, quiet=quiet)


def test_a_process_killed_as_the_base_is_measured_keeps_no_other_arm_from_running(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nybble.compare import run as module

    monkeypatch.setattr(module, "run_arms", _killed_at_the_base)
    found = compare_arms(config, read_arms("base,lora", {"samples": 0}), quiet=True)
    assert [arm.status for arm in found.arms] == ["failed", "finished"]
    assert "ended from outside" in found.arm("base").error


def _killed_at_the_base(layout: Layout, arms: list[Arm], *, quiet: bool) -> None:
    """What the system does when memory runs out, as the base's own arm sees the test rows."""
    losses = Worker._losses

    def killed(worker: Worker, run: PlannedRun, *args: Any) -> tuple[float, ...]:
        return losses(worker, run, *args) if run.arm.trained else os._exit(9)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "_losses", killed)
        run_arms(layout, arms, quiet=quiet)


def test_an_arm_ends_with_the_process_that_started_it(config: RunConfig, tmp_path: Path) -> None:
    longer = with_settings(config, train__max_steps=100_000)
    (tmp_path / "long.yaml").write_text(longer.to_yaml())
    script = (
        "from pathlib import Path; from nybble.compare.run import compare_arms; from nybble.config import RunConfig\n"
        "from nybble.compare.config import read_arms\n"
        f"compare_arms(RunConfig.read(Path({str(tmp_path / 'long.yaml')!r}), {{}}), read_arms('lora'), quiet=True)"
    )
    folder = Path(config.output) / "lora/seed-0"
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL) as parent:
        _wait_until(lambda: (folder / "log.jsonl").exists() and (folder / "log.jsonl").stat().st_size > 0)
        parent.kill()
    _wait_until(lambda: json.loads((folder / "run.json").read_text())["status"] == "interrupted")
    assert list(folder.glob("checkpoints/step-*"))


_INTERRUPTED = """
import sys, time
from pathlib import Path
from nybble.compare import run
from nybble.compare.config import read_arms
from nybble.config import RunConfig

def slow(layout, arms, *, quiet):
    (layout.output / "begun").touch()
    try:
        time.sleep(100)
    except KeyboardInterrupt:
        time.sleep(0.5)  # the second signal comes while the first one is dealt with
        (layout.output / "interrupted").touch()
        raise

if __name__ == "__main__":
    run.run_arms = slow
    run.compare_arms(RunConfig.read(Path(sys.argv[1]), {}), read_arms("lora"), quiet=True)
"""


def test_two_interrupts_at_once_end_a_comparison_and_its_process(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(_INTERRUPTED)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    output, command = Path(config.output), [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "config.yaml")]
    # A shell that starts this in the background has it ignore SIGINT, and all that it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, process_group=0) as parent:
        signal.signal(signal.SIGINT, before)
        try:
            _wait_until((output / "begun").exists)
            # As `timeout -s INT` does: to the group, with the process of arms in it, and to this one process once more.
            os.killpg(parent.pid, signal.SIGINT)
            time.sleep(0.05)
            parent.send_signal(signal.SIGINT)
            _, told = parent.communicate(timeout=30)
        finally:
            if parent.poll() is None:
                os.killpg(parent.pid, signal.SIGKILL)
    assert parent.returncode == -signal.SIGINT
    assert told.rstrip().endswith("KeyboardInterrupt: run the same command again to go on")
    assert (output / "interrupted").exists()


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_other_settings_are_refused_or_replace(config: RunConfig) -> None:
    before = run_here(config, read_arms("base"))
    other_rank = with_settings(config, lora__r=4)
    assert compare_arms(other_rank, read_arms("base"), quiet=True).arm("base").runs == before.arm("base").runs
    other_data = with_settings(config, data__max_length=48)
    with pytest.raises(UserError, match="base: data"):
        compare_arms(other_data, read_arms("base"), quiet=True)
    compare_arms(other_data, read_arms("base"), replace=True, quiet=True)
    record = Path(config.output) / "base" / "compare.json"
    assert json.loads(record.read_text())["settings"]["data"]["max_length"] == 48


def test_other_rows_or_weights_at_the_same_place_are_refused(config: RunConfig, tmp_path: Path) -> None:
    shutil.copytree(config.model.name, tmp_path / "model")
    config = with_settings(config, model__name=str(tmp_path / "model"))
    compare = read_arms("base,lora", {"samples": 0})
    run_here(config, compare)
    train, base = Path(config.data.path) / "train.jsonl", Path(config.model.name) / "model.safetensors"
    rows, weights = train.read_bytes(), base.read_bytes()
    train.write_bytes(rows.replace(b"number", b"figure"))
    with pytest.raises(UserError, match=r"lora/seed-0: training rows\n"):
        compare_arms(config, compare, quiet=True)
    train.write_bytes(rows)
    base.unlink()  # it may be mapped into memory
    base.write_bytes(weights[:-64] + bytes(64))
    with pytest.raises(UserError, match=r"base: base weights\n.*lora/seed-0: base weights"):
        compare_arms(config, compare, quiet=True)
    for record in Path(config.output).rglob("compare.json"):  # as earlier versions left it, which tells no digests
        kept = json.loads(record.read_text())
        del kept["contents"], kept["measured"]["how"]["rows"]
        record.write_text(json.dumps(kept))
    layout = Layout(config, compare, Path(config.output))
    assert not settle_changes(layout)
    assert all(is_finished(layout, arm) for arm in compare.arms)


def test_other_held_out_rows_at_the_same_place_are_measured_anew(config: RunConfig) -> None:
    compare = read_arms("base,lora", {"samples": 0})
    first = run_here(config, compare)
    held_out = Path(config.data.path) / "valid.jsonl"
    held_out.write_bytes(held_out.read_bytes().replace(b"number", b"figure"))
    layout = Layout(config, compare, Path(config.output))
    assert not settle_changes(layout)
    assert not any(is_finished(layout, arm) for arm in compare.arms)
    again = run_here(config, compare)
    for arm in ("base", "lora"):
        assert again.arm(arm).loss_after != first.arm(arm).loss_after
    assert again.arm("lora").runs[0].curve == first.arm("lora").runs[0].curve  # not trained again
    # Where they choose, they are a part of how a run came about.
    choosing = with_settings(config, train__eval_every=1, output=f"{config.output}-choosing")
    run_here(choosing, read_arms("lora", {"samples": 0}))
    held_out.write_bytes(held_out.read_bytes().replace(b"figure", b"number"))
    with pytest.raises(UserError, match="lora/seed-0: validation rows"):
        compare_arms(choosing, read_arms("lora", {"samples": 0}), quiet=True)


def test_neither_a_run_nor_a_comparison_overwrites_the_other(config: RunConfig, tmp_path: Path) -> None:
    compare_arms(config, read_arms("base"), quiet=True)
    alone = with_settings(config, output=str(tmp_path / "alone"))
    run_training(alone, quiet=True)
    for refused, other in ((run_training, config), (lambda run: compare_arms(run, read_arms("base")), alone)):
        held = (Path(other.output) / "config.yaml").read_text()
        with pytest.raises(UserError, match=r"holds a (run|comparison)"):
            refused(other)
        assert (Path(other.output) / "config.yaml").read_text() == held


def test_an_unfinished_run_goes_on_from_its_checkpoint(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "_counter", lambda _: time.perf_counter)  # a watt
    saving = with_settings(config, train__save_every=1)
    first = run_here(saving, read_arms("lora")).arm("lora")
    whole = first.loss_after
    assert first.runs[0].energy_joules == pytest.approx(first.runs[0].energy_seconds, rel=0.1)
    folder = Path(config.output) / "lora/seed-0"
    first_step = (folder / "log.jsonl").read_text().splitlines()[0]
    _undo_second_step(folder)
    resumed = run_here(saving, read_arms("lora")).arm("lora")
    assert resumed.loss_after == whole
    assert resumed.runs[0].energy_joules is None  # what the first step used is not known
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert lines[0] == first_step  # its seconds too: it was not done again
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    # Nor is it what a run before it used, which failed.
    _undo_second_step(folder)
    compare = read_arms("lora")
    worker = Worker(Layout(saving, compare, Path(config.output)), quiet=True)
    worker.energy.start()
    worker.run(compare.arms[0])
    assert json.loads((folder / "compare.json").read_text())["trained"]["energy_joules"] is None


def _undo_second_step(folder: Path) -> None:
    """As if the run had been killed after its first step."""
    shutil.rmtree(folder / "checkpoints" / "step-000002")
    shutil.rmtree(folder / "adapter")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": "running"}))
    kept = json.loads((folder / "compare.json").read_text())
    (folder / "compare.json").write_text(json.dumps({"settings": kept["settings"]}))


def test_an_error_of_all_arms_is_told_as_it_was(config: RunConfig) -> None:
    nowhere = with_settings(config, model__name=config.data.path)
    with pytest.raises(UserError, match=r"no config\.json") as caught:
        compare_arms(nowhere, read_arms("lora"), quiet=True)
    assert caught.value.where == config.data.path


def test_arms_need_held_out_rows(config: RunConfig) -> None:
    (Path(config.data.path) / "valid.jsonl").unlink()
    with pytest.raises(UserError, match="holds out no rows"):
        compare_arms(config, read_arms("lora"), quiet=True)


def test_all_rows_are_measured_where_none_is_held_out(config: RunConfig) -> None:
    assert len(held_out_examples(config.model, None, config.data)) == 5
    (Path(config.data.path) / "valid.jsonl").unlink()
    assert len(held_out_examples(config.model, None, config.data)) == 8
