"""Files are whole or not there, and what goes wrong is said in words."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nybble.calibrate.text import read_calibration_text
from nybble.compare.config import read_arms
from nybble.config import RunConfig
from nybble.errors import UserError
from nybble.files import (
    atomic_folder,
    cache_folder,
    check_writable,
    read_json,
    require_new_folder,
    require_writable_file,
    write_json,
    write_rows,
)
from nybble.models.tensorfile import read_entries
from tests.tiny import tiny_tokenizer


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "made"
    with atomic_folder(target) as aside:
        (aside / "inner").mkdir()
        (aside / "inner" / "file").write_text("x")
        assert not target.exists()
    assert (target / "inner" / "file").read_text() == "x"
    assert [path.name for path in target.parent.iterdir()] == ["made"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with atomic_folder(target) as aside:
        (aside / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(target, replace=True) as aside:  # noqa: PT012
        (aside / "file").write_text("half")
        raise KeyboardInterrupt
    assert (target / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "made"
    target.mkdir()
    with pytest.raises(UserError, match="already exists"), atomic_folder(target):
        pass
    with atomic_folder(target, replace=True) as aside:
        (aside / "new").touch()
    assert [path.name for path in target.iterdir()] == ["new"]


@pytest.mark.parametrize("late", [False, True])
def test_what_came_to_be_there_meanwhile_is_kept_and_what_was_made_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """late: between the last look and the renaming."""
    target = tmp_path / "made"
    with pytest.raises(UserError, match="already exists") as caught, atomic_folder(target) as aside:  # noqa: PT012
        (aside / "file").write_text("ours")
        for taken in (target, tmp_path / "made-2"):
            taken.mkdir()
            (taken / "file").write_text("theirs")
        if late:
            looks = iter([False, True] * 2)
            monkeypatch.setattr("nybble.files.os.path.lexists", lambda _: next(looks, False))
    assert caught.value.where == str(target)
    assert str(tmp_path / "made-3") in caught.value.what
    found = {path.name: (path / "file").read_text() for path in tmp_path.iterdir()}
    assert found == {"made": "theirs", "made-2": "theirs", "made-3": "ours"}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "no space left on the disk"),
        (errno.EFBIG, "beyond the largest size"),
        (errno.EACCES, "no permission"),
        (errno.ENOTDIR, "a file stands"),
    ],
)
def test_errors_of_the_system_are_explained(tmp_path: Path, code: int, message: str) -> None:
    with pytest.raises(UserError, match=message), atomic_folder(tmp_path / "made"):
        raise OSError(code, os.strerror(code))
    assert not list(tmp_path.iterdir())


def test_errors_of_other_files_are_not_blamed_on_what_is_written(tmp_path: Path) -> None:
    target = tmp_path / "made"
    for other in (tmp_path / "made-before", tmp_path / "input" / "model.safetensors"):
        with pytest.raises(PermissionError, match=re.escape(str(other))), atomic_folder(target):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(other))
    for own in (target / "file", target.with_name(f".made.partial-{os.getpid()}") / "file", tmp_path):
        with pytest.raises(UserError, match="no permission to write here"), atomic_folder(target):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(own))


def test_input_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by `open` itself, as root may read whatever its mode is."""
    settings, tensors = tmp_path / "config.json", tmp_path / "model.safetensors"
    write_json(settings, {})
    save_file({"zeros": torch.zeros(4)}, tensors)
    entry = read_entries(tensors)["zeros"]

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr("numpy.memmap", refuse)
    reads = {lambda: read_json(settings): settings, lambda: read_entries(tensors): tensors}
    reads |= dict.fromkeys((entry.read, entry.mapped, lambda: entry.read_bytes(0, 4)), tensors)
    run, text = tmp_path / "run.yaml", tmp_path / "text.txt"
    text.touch()
    reads |= {lambda: RunConfig.read(run, {}): run, lambda: read_arms(str(run)): run}
    reads |= {lambda: read_calibration_text(str(text), tiny_tokenizer(), tokens=8, length=8): text}
    for read, file in reads.items():
        with pytest.raises(UserError, match=f"{re.escape(str(file))}: no permission to read it"):
            read()


@contextlib.contextmanager
def files_at_most(num_bytes: int) -> Iterator[None]:
    """Only for as long as the code under test runs: what pytest itself prints may go to a larger file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_errors_of_the_system_that_safetensors_met_are_explained(tmp_path: Path) -> None:
    tensors = {"zeros": torch.zeros(1024)}
    refused = pytest.raises(UserError, match="beyond the largest size")
    with refused, atomic_folder(tmp_path / "made") as aside, files_at_most(1024):
        save_file(tensors, aside / "zeros.safetensors")
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nybble")):
        with pytest.raises(UserError, match=re.escape(str(place))):
            check_writable(place)
        with pytest.raises(UserError, match=re.escape(str(place))):
            require_new_folder(place / "made")
        with pytest.raises(UserError, match=re.escape(str(place))):
            require_writable_file(place / "made.json")
    with pytest.raises(UserError, match="is a folder"):
        require_writable_file(tmp_path)
    require_writable_file(tmp_path / "file")
    require_writable_file(tmp_path / "new" / "file")
    assert not (tmp_path / "new" / "file").exists()


def test_json_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    with pytest.raises(UserError, match="no such file"):
        read_json(path)
    path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(path)
    write_json(path, {"ä": 1})
    assert read_json(path) == {"ä": 1}
    write_rows(path, [{"ä": 1}, {"b": "two\nlines"}])
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [
        {"ä": 1},
        {"b": "two\nlines"},
    ]


def test_the_cache_is_where_the_platform_wants_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "nybble"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "nybble"
