"""A second run takes over what the first one tokenized, exactly, and nothing else is ever taken for it."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from nybble.data import cache
from nybble.data.config import DataConfig
from nybble.data.prepare import PreparedData, prepare_data
from nybble.data.template import ChatTemplate
from nybble.train.preflight import data_notes
from tests.data import templates
from tests.data.templates import tokenizer_with

ROWS = [{"prompt": f"What is {i}?", "completion": f"It is {i}." * (1 + i % 5)} for i in range(40)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache's files will be: an empty cache for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nybble" / "data"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", ROWS)


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def prepare(file: Path, tokenizer: PreTrainedTokenizerFast | None = None, **settings: Any) -> PreparedData:
    config = DataConfig(**({"path": str(file), "max_length": 128, "validation_fraction": 0.2} | settings))
    return prepare_data(config, tokenizer or tokenizer_with(templates.CHATML), model_max_length=512)


def assert_equal(one: PreparedData, other: PreparedData) -> None:
    assert (one.report, one.validation_report, one.chat_template) == (
        other.report,
        other.validation_report,
        other.chat_template,
    )
    assert (len(one.train), len(one.validation)) == (len(other.train), len(other.validation))
    for first, second in zip([*one.train, *one.validation], [*other.train, *other.validation], strict=True):
        assert first.input_ids.dtype == second.input_ids.dtype
        assert torch.equal(first.input_ids, second.input_ids)
        assert torch.equal(first.trained, second.trained)
        assert torch.equal(first.position_ids, second.position_ids)
        assert (first.lengths, first.row) == (second.lengths, second.row)


@pytest.mark.parametrize("settings", [{}, {"packing": True}, {"validation_fraction": 0.0}], ids=str)
def test_the_second_time_nothing_is_tokenized(
    file: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    first = prepare(file, **settings)
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", None)
    monkeypatch.setattr(ChatTemplate, "render", None)
    second = prepare(file, **settings)
    assert (first.from_cache, second.from_cache) == (False, True)
    assert data_notes(second) == ["data from cache", *data_notes(first)]
    assert_equal(first, second)
    assert list(second.report.formats) == list(first.report.formats)
    with pytest.raises(TypeError):
        prepare(file, **settings, cache=False)


def test_where_the_data_and_the_template_lie_does_not_matter(file: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(templates.CHATML)
    first = prepare(file, chat_template=str(template))
    moved = (file.rename(tmp_path / "moved.jsonl"), template.rename(tmp_path / "moved.jinja"))
    second = prepare(moved[0], chat_template=str(moved[1]))
    assert second.from_cache
    assert_equal(first, second)


@pytest.mark.parametrize(
    "changed",
    [
        {"max_length": 100},
        {"train_on": "all"},
        {"packing": True},
        {"use_chat_template": False},
        {"validation_fraction": 0.3},
        {"seed": 1},
        {"max_rows": 39},
    ],
    ids=str,
)
def test_another_setting_is_another_result(file: Path, changed: dict[str, Any]) -> None:
    prepare(file)
    assert not prepare(file, **changed).from_cache
    assert prepare(file, **changed).from_cache
    assert prepare(file).from_cache


def with_token(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_tokens(["What is"])


def with_another_end(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = "<|end|>"


def with_another_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = templates.LLAMA3


@pytest.mark.parametrize("change", [with_token, with_another_end, with_another_template])
def test_another_tokenizer_is_another_result(file: Path, change: Callable[[PreTrainedTokenizerFast], None]) -> None:
    prepare(file)
    tokenizer = tokenizer_with(templates.CHATML)
    change(tokenizer)
    found = prepare(file, tokenizer)
    assert not found.from_cache
    assert_equal(found, prepare(file, tokenizer, cache=False))


def test_other_rows_or_held_out_rows_or_another_template_are_another_result(file: Path, tmp_path: Path) -> None:
    held_out = write(tmp_path / "held-out.jsonl", ROWS[:3])
    template = tmp_path / "template.jinja"
    template.write_text(templates.CHATML)
    settings = {"validation_fraction": 0.0, "validation_path": str(held_out), "chat_template": str(template)}
    assert not prepare(file, **settings).from_cache
    assert prepare(file, **settings).from_cache
    write(file, [*ROWS[:-1], {"prompt": "What is 39?", "completion": "It is 40."}])
    assert not prepare(file, **settings).from_cache
    write(held_out, ROWS[:4])
    assert not prepare(file, **settings).from_cache
    template.write_text(templates.CHATML + " ")
    assert not prepare(file, **settings).from_cache
    assert prepare(file, **settings).from_cache


def test_a_template_that_tells_the_date_is_rendered_anew_each_day(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_with("{{ strftime_now('%d %B %Y') }}" + templates.CHATML)
    prepare(file, tokenizer)
    assert prepare(file, tokenizer).from_cache

    class Tomorrow(date):
        @classmethod
        def today(cls) -> date:
            return date(2100, 1, 1)

    prepare(file)
    monkeypatch.setattr(cache, "date", Tomorrow)
    assert not prepare(file, tokenizer).from_cache
    assert prepare(file).from_cache


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


def count_more(file: Path) -> None:
    facts = json.loads(file.read_text())
    facts["report"]["truncated"] += 1
    file.write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("suffix", "spoil"),
    [
        (".safetensors", cut),
        (".safetensors", flip),
        (".safetensors", Path.unlink),
        (".json", cut),
        (".json", count_more),
        (".json", Path.unlink),
        (".json", lambda file: file.write_text("[]")),
    ],
)
def test_what_is_not_as_it_was_written_is_made_again(
    file: Path, folder: Path, suffix: str, spoil: Callable[[Path], None]
) -> None:
    first = prepare(file)
    (kept,) = folder.glob(f"*{suffix}")
    spoil(kept)
    again = prepare(file)
    assert not again.from_cache
    assert_equal(first, again)
    assert prepare(file).from_cache


def test_runs_that_write_at_once_do_not_clash(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getpid", threading.get_ident)  # threads stand for processes
    tensor, facts = torch.arange(100_000), {"fact": "x" * 1000}
    writers = [
        threading.Thread(target=lambda: [cache.write("key", {"tensor": tensor}, facts) for _ in range(20)])
        for _ in range(3)
    ]
    for writer in writers:
        writer.start()
    found = 0
    while any(writer.is_alive() for writer in writers):
        if (kept := cache.read("key")) is not None:
            found += 1
            assert torch.equal(kept[0]["tensor"], tensor)
            assert kept[1] == facts
    assert found
    assert sorted(path.name for path in folder.iterdir()) == ["key.json", "key.safetensors"]


def test_a_cache_that_cannot_be_written_is_no_error(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stands here").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "stands here"))
    assert not prepare(file).from_cache
    assert not prepare(file).from_cache


def test_without_the_cache_nothing_is_kept(file: Path, folder: Path) -> None:
    prepare(file, cache=False)
    assert not folder.exists()


def test_what_was_of_no_use_for_a_month_goes(file: Path, folder: Path) -> None:
    prepare(file)
    prepare(file, max_length=100)
    long_ago = time.time() - 31 * 24 * 3600
    for path in folder.iterdir():
        os.utime(path, (long_ago, long_ago))
    assert prepare(file).from_cache
    prepare(file, max_length=110)
    assert prepare(file).from_cache
    assert len(list(folder.iterdir())) == 4
    assert not prepare(file, max_length=100).from_cache
