"""Text becomes windows of one length, from plain files and from rows."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
import torch

from nybble.calibrate.text import read_calibration_text
from nybble.errors import UserError
from tests.tiny import START, tiny_tokenizer

TEXT = "".join(f"The number {n} comes after {n - 1}.\n" for n in range(400))


def test_windows_of_a_plain_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.calibrate.text._CHARACTERS_AT_ONCE", 1000)
    monkeypatch.setattr("nybble.calibrate.text._MULTIPLE", 1)
    tokenizer = tiny_tokenizer()
    (tmp_path / "text.txt").write_text(TEXT)
    whole = torch.tensor(tokenizer(TEXT).input_ids)
    found = read_calibration_text(str(tmp_path / "text.txt"), tokenizer, tokens=10**6, length=32)
    assert torch.equal(found.windows.view(-1), whole[: len(whole) // 32 * 32])
    assert found.tokens == found.windows.numel()


@pytest.mark.parametrize(("tokens", "windows"), [(10**6, 304), (7 * 32, 7), (15 * 32, 8)])
def test_many_windows_are_a_multiple(tmp_path: Path, tokens: int, windows: int) -> None:
    """Of 309: so that a number of them, rather than one, can go through a layer together."""
    (tmp_path / "text.txt").write_text(TEXT)
    found = read_calibration_text(str(tmp_path / "text.txt"), tiny_tokenizer(), tokens=tokens, length=32)
    assert found.windows.shape == (windows, 32)
    assert len(found.windows.unique(dim=0)) == windows


def test_a_long_text_is_held_in_few_bytes_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.calibrate.text._CHARACTERS_AT_ONCE", 1000)
    tokenizer = tiny_tokenizer()
    (tmp_path / "text.txt").write_text(TEXT * 20)
    tokens = len(tokenizer(TEXT).input_ids) * 20
    tracemalloc.start()
    try:
        read_calibration_text(str(tmp_path / "text.txt"), tokenizer, tokens=64, length=32)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 6 * tokens + 2**18  # 4 bytes and the array's room to grow; beside them one piece


def test_fewer_windows_are_spread_over_all_of_it(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    given = (str(tmp_path / "text.txt"), tiny_tokenizer())
    every = read_calibration_text(*given, tokens=10**6, length=16).windows
    some = read_calibration_text(*given, tokens=4 * 16, length=16)
    assert some.windows.shape == (4, 16)
    positions = [(every == window).all(1).nonzero()[0, 0].item() for window in some.windows]
    assert positions == [len(every) * part // 4 for part in range(4)]
    assert some.digest != read_calibration_text(*given, tokens=5 * 16, length=16).digest
    assert some.digest == read_calibration_text(*given, tokens=4 * 16, length=16).digest


def test_rows_come_as_their_template_has_them(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is a number."}]
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 20)
    tokenizer = tiny_tokenizer()
    found = read_calibration_text(str(tmp_path / "chats.jsonl"), tokenizer, tokens=64, length=64)
    assert tokenizer.decode(found.windows[0]).startswith(f"{START}user\nWhat is it?")
    (tmp_path / "text.jsonl").write_text('{"text": "Hello there."}\n' * 40)
    plain = read_calibration_text(str(tmp_path / "text.jsonl"), tokenizer, tokens=64, length=64)
    assert tokenizer.decode(plain.windows[0]).startswith(f"Hello there.{tokenizer.eos_token}Hello")


@pytest.mark.parametrize(("content", "message"), [("Too short.", "less than one window"), ("\udcff", "not UTF-8")])
def test_what_cannot_be_used(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "text.txt").write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=message):
        read_calibration_text(str(tmp_path / "text.txt"), tiny_tokenizer(), tokens=64, length=64)
    (tmp_path / "rows.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl, line 1.*no known kind"):
        read_calibration_text(str(tmp_path / "rows.jsonl"), tiny_tokenizer(), tokens=64, length=64)
