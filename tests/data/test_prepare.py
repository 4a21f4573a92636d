"""From files to examples: what is kept, cut, dropped, held out and refused, and that the report says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nybble.data.config import DataConfig
from nybble.data.prepare import PreparedData, prepare_data, split_held_out
from nybble.data.source import Row
from nybble.errors import UserError
from tests.data import templates
from tests.data.templates import tokenizer_with

PAIRS = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(40)]


def prepare(
    folder: Path, rows: list[dict[str, Any]], *, template: str | None = templates.CHATML, **settings: Any
) -> PreparedData:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(**({"path": str(file), "max_length": 256} | settings))
    return prepare_data(config, tokenizer_with(template), model_max_length=512)


def test_the_report_counts_what_there_is(tmp_path: Path) -> None:
    rows = [*PAIRS[:3], {"text": "The quick brown fox."}]
    data = prepare(tmp_path, rows)
    report = data.report
    assert (report.rows, report.samples, report.sequences) == (4, 4, 4)
    assert report.formats == {"prompt/completion": 3, "text": 1}
    assert report.tokens == sum(len(example) for example in data.train)
    assert report.target_tokens == sum(int((example.labels != -100).sum()) for example in data.train)
    assert report.longest == max(len(example) for example in data.train)
    assert (report.truncated, report.dropped, report.padding_share, report.duplicates) == (0, 0, 0.0, 0)
    assert report.eos_trained
    assert not report.bos_doubled
    assert not report.bos_missing
    assert data.chat_template == templates.CHATML
    assert data.validation_report is None
    assert [example.row for example in data.train] == [0, 1, 2, 3]


def test_long_samples_are_cut_and_those_left_without_loss_dropped(tmp_path: Path) -> None:
    long_answer = {"prompt": "a", "completion": "word " * 100}
    long_question = {"prompt": "word " * 100, "completion": "a"}
    data = prepare(tmp_path, [PAIRS[0], long_answer, long_question], max_length=80)
    assert (data.report.truncated, data.report.dropped, data.report.samples) == (2, 1, 3)
    assert [example.row for example in data.train] == [0, 1]
    assert len(data.train[1]) == 80
    assert data.report.eos_trained  # of the one that was not cut
    only_cut = prepare(tmp_path, [long_answer], max_length=80)
    assert not only_cut.report.eos_trained


def test_all_labels_masked_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="all labels are masked"):
        prepare(tmp_path, [{"prompt": "word " * 100, "completion": "a"}] * 2, max_length=32)


def test_rows_that_cannot_be_trained_on_are_listed_with_their_lines(tmp_path: Path) -> None:
    rows = [
        PAIRS[0],
        {"question": "x"},
        {"messages": [{"role": "user", "content": "x"}]},
        PAIRS[1],
        {"messages": [{"role": "assistant", "content": 3}]},
    ]
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, rows)
    lines = caught.value.what.splitlines()[1:]
    assert [line.strip().partition("rows.jsonl, ")[2][:6] for line in lines] == ["line 2", "line 3", "line 5"]
    assert "has the fields question" in lines[0]
    assert "no assistant turn" in lines[1]
    with pytest.raises(UserError, match="line 2 has no token to train on"):
        prepare(tmp_path, [PAIRS[0], {"text": ""}], template=None)
    with pytest.raises(UserError, match=r"line 2 has '\\ud83d', which is half a character"):
        prepare(tmp_path, [PAIRS[0], {"text": "\ud83d"}])


def test_max_length_above_the_models_is_refused_before_anything_is_read() -> None:
    config = DataConfig(path="missing.jsonl", max_length=1024)
    with pytest.raises(UserError, match="is 1024, but the model has positions for 512 tokens"):
        prepare_data(config, tokenizer_with(None), model_max_length=512)


def test_max_length_left_out_is_what_the_model_takes() -> None:
    left_out, given = DataConfig(path="x"), DataConfig(path="x", max_length=300)
    assert [left_out.length_within(limit) for limit in (512, 4096, None)] == [512, 1024, 1024]
    assert [given.length_within(limit) for limit in (512, None)] == [300, 300]


def test_packing_fills_training_sequences_and_leaves_held_out_ones(tmp_path: Path) -> None:
    plain = prepare(tmp_path, PAIRS, validation_fraction=0.2)
    packed = prepare(tmp_path, PAIRS, validation_fraction=0.2, packing=True)
    assert {len(example) for example in packed.train} == {256}
    assert packed.report.sequences == len(packed.train) < packed.report.samples == 32
    assert packed.report.target_tokens == plain.report.target_tokens == sum(e.target_tokens for e in packed.train)
    pads = sum(256 - sum(example.lengths) for example in packed.train)
    assert packed.report.padding_share == pytest.approx(pads / (256 * len(packed.train)))
    assert [len(example) for example in packed.validation] == [len(example) for example in plain.validation]


def test_held_out_rows_come_from_a_fraction_a_file_or_a_folder(tmp_path: Path) -> None:
    by_fraction = prepare(tmp_path, PAIRS, validation_fraction=0.1)
    assert (len(by_fraction.train), len(by_fraction.validation)) == (36, 4)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, rows in (("train", PAIRS[:5]), ("valid", PAIRS[3:6])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    by_folder = prepare(tmp_path, PAIRS, path=str(folder))
    by_file = prepare(tmp_path, PAIRS[:5], validation_path=str(folder / "valid.jsonl"))
    for data in (by_folder, by_file):
        assert (len(data.train), len(data.validation)) == (5, 3)
        assert data.validation_report is not None
        assert data.validation_report.duplicates == 2  # rows 3 and 4 are in both
    with pytest.raises(UserError, match=r"beside data\.validation_path"):
        prepare(tmp_path, PAIRS, validation_path="x.jsonl", validation_fraction=0.5)


def test_the_split_depends_on_the_seed_and_keeps_identical_rows_together() -> None:
    rows = [Row({"text": f"row {index // 2}"}, "here") for index in range(100)]
    train, held_out = split_held_out(rows, 0.3, seed=1)
    assert len(held_out) == 30
    assert not {row.fields["text"] for row in train} & {row.fields["text"] for row in held_out}
    assert split_held_out(rows, 0.3, seed=1) == (train, held_out)
    assert split_held_out(rows, 0.3, seed=2) != (train, held_out)
    reversed_train, _ = split_held_out(rows[::-1], 0.3, seed=1)
    assert reversed_train == train[::-1]
    with pytest.raises(UserError, match="holds out all of the 2 rows"):
        split_held_out(rows[:2], 0.5, seed=1)


def test_rows_become_the_same_examples_every_time(tmp_path: Path) -> None:
    first, second = (prepare(tmp_path, PAIRS, validation_fraction=0.2, packing=True) for _ in range(2))
    assert first.report == second.report
    for one, other in zip([*first.train, *first.validation], [*second.train, *second.validation], strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.labels.tolist() == other.labels.tolist()


def test_a_template_that_doubles_or_forgets_bos_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}))
    config = DataConfig(path=str(file))

    def facts(template: str) -> tuple[bool, bool]:
        report = prepare_data(config, tokenizer_with(template, add_bos=True), model_max_length=None).report
        return report.bos_doubled, report.bos_missing

    assert facts(templates.LLAMA3) == (False, False)
    assert facts("{{ bos_token }}" + templates.LLAMA3) == (True, False)
    assert facts(templates.CHATML) == (False, True)


def test_progress_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(PAIRS[0]))
    config = DataConfig(path=str(file))
    quiet, shown = (
        prepare_data(config, tokenizer_with(None), model_max_length=None, progress=progress)
        for progress in (False, True)
    )
    assert quiet.report == shown.report
    assert capsys.readouterr() == ("", "")  # not a terminal
