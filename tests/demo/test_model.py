"""Where the demo's model is kept, and that nothing but the known file is taken for it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from nybble.demo.model import NAME, check_sha256, demo_model
from nybble.errors import UserError


def test_a_converted_model_is_used_again(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    assert demo_model(tmp_path) == tmp_path / NAME


def test_a_model_that_another_demo_made_meanwhile_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(_: Path, aside: Path) -> None:
        for folder in (aside, tmp_path / NAME):
            folder.mkdir(exist_ok=True)
            (folder / "config.json").touch()

    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    monkeypatch.setattr("nybble.demo.model._fetch", lambda _: None)
    monkeypatch.setattr("nybble.demo.model.check_sha256", lambda *_: None)
    monkeypatch.setattr("nybble.demo.gguf.convert_gguf", convert)
    assert demo_model(tmp_path) == tmp_path / NAME
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_another_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    check_sha256(file, hashlib.sha256(b"GGUF").hexdigest())
    with pytest.raises(UserError, match="sha256"):
        check_sha256(file, hashlib.sha256(b"other").hexdigest())
