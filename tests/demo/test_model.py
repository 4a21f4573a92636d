"""Where the demo's model is kept, and that nothing but the known file is taken for it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from nybble.demo.model import NAME, cache_folder, check_sha256, demo_model
from nybble.errors import UserError


def test_a_converted_model_is_used_again(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    assert demo_model(tmp_path) == tmp_path / NAME


def test_another_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    check_sha256(file, hashlib.sha256(b"GGUF").hexdigest())
    with pytest.raises(UserError, match="sha256"):
        check_sha256(file, hashlib.sha256(b"other").hexdigest())


def test_the_cache_is_where_the_platform_wants_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "nybble"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "nybble"
