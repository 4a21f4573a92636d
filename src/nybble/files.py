"""Files that are either whole or not there: written aside, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from nybble.errors import UserError
from nybble.units import format_bytes


@contextlib.contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a new empty folder beside `target`, which on success is flushed and becomes `target`, or else is removed.

    An existing `target` is an error unless `replace`, and then it stays whole until the new one is complete. What came
    to be at `target` in the meantime is kept without `replace`, and the finished folder too: see `put_new_folder`.
    """
    if not replace:
        require_new_folder(target)
    aside = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with explain_write_errors(target):
            aside.mkdir(parents=True)
            yield aside
            for file in aside.rglob("*"):
                _flush(file)
            if replace:
                _put_in_place(aside, target)
            else:
                put_new_folder(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def require_new_folder(target: Path) -> None:
    """Raise UserError if there is something at `target` already, or nothing can be made there."""
    if target.exists():
        raise UserError("already exists", where=target, fix="Name another folder, or remove this one.")
    check_writable(target.parent)


def put_new_folder(made: Path, target: Path) -> None:
    """Rename the finished folder `made` to `target`, where nothing was when the work began.

    If something is there by now, such as the result of another run, it stays: `made`, which may have taken hours, gets
    a name of its own beside it, and a UserError says which.
    """
    place = target
    for number in itertools.count(2):
        if _rename_to_free(made, place):
            break
        place = target.with_name(f"{target.name}-{number}")
    _flush(target.parent)
    if place != target:
        what = f"already exists: it was made in the meantime, and is kept; what was to be here is whole, in {place}"
        raise UserError(what, where=target, fix="Keep the one that you want.")


def require_writable_file(file: Path) -> None:
    """Raise UserError unless `file` can be written, anew or over an older one; its folder is created if need be."""
    if file.is_dir():
        raise UserError("is a folder", where=file, fix="Name a file.")
    check_writable(file.parent)


def cache_folder() -> Path:
    """Where this platform keeps what programs can make or fetch again."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "nybble"


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step."""
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with explain_write_errors(path):
        try:
            aside.write_bytes(data)
            _flush(aside)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace `path` by `rows`, one JSON object a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path) -> Any:
    """The JSON value in `path`; raises UserError when the file is missing or is not JSON."""
    try:
        with explain_no_permission(path):
            return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("no such file", where=path) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"is not valid JSON: {error}", where=path) from None


def read_yaml(path: Path) -> Any:
    """The value in the YAML file `path`; raises UserError when the file is missing or is not YAML."""
    try:
        with explain_no_permission(path):
            return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("no such file", where=path) from None
    except IsADirectoryError:
        raise UserError("is a folder, not a YAML file", where=path) from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"is not valid YAML: {error}", where=path) from None


@contextlib.contextmanager
def explain_corruption(file: Path, *, fix: str | None = None) -> Iterator[None]:
    """Around what reads the safetensors `file`: a UserError that names it if it is corrupt or cut off."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"is corrupt or truncated: {error}", where=file, fix=fix) from None


@contextlib.contextmanager
def explain_no_permission(file: Path) -> Iterator[None]:
    """Around what reads `file`: a UserError that names it if this user may not."""
    try:
        yield
    except PermissionError as error:
        fix = "Make it readable for this user (chmod u+r)."
        raise UserError("no permission to read it", where=file, fix=fix) from error


def check_writable(folder: Path) -> None:
    """Raise UserError unless files can be made in `folder`, which is created if need be."""
    probe = folder / f".write-test-{os.getpid()}"
    try:
        with explain_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"x")
            probe.unlink()
    except OSError as error:  # of kinds that only odd places have, such as /proc
        raise UserError(f"cannot be written: {error.strerror}", where=folder, fix="Choose another folder.") from error


@contextlib.contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors of writing `path` (no space, no permission, not a folder) into a UserError.

    Files that are read on the way lie elsewhere: errors that name one are no errors of writing.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _may_be_of(path, error):
            raise
        code = _error_number(error)
        if code in (errno.ENOSPC, errno.EDQUOT):
            parent = next(p for p in (path, *path.parents) if p.exists())
            free = format_bytes(shutil.disk_usage(parent).free)
            raise UserError(f"no space left on the disk ({free} free)", where=path, fix="Free some space.") from error
        if code == errno.EFBIG:
            fix = "Raise the limit (ulimit -f), or choose another disk."
            raise UserError("a file grew beyond the largest size allowed here", where=path, fix=fix) from error
        if code in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError("no permission to write here", where=path, fix="Choose another folder.") from error
        if code in (errno.ENOTDIR, errno.EEXIST):
            raise UserError("a file stands where a folder is needed", where=path, fix="Choose another name.") from error
        raise


def _may_be_of(target: Path, error: OSError | SafetensorError) -> bool:
    """Whether the file that `error` names, if any, is `target`, below it, written aside for it, or a folder above."""
    name = error.filename if isinstance(error, OSError) else None
    if not isinstance(name, str | bytes | Path):
        return True
    file, target = Path(os.fsdecode(name)).absolute(), target.absolute()
    if file.is_relative_to(target) or target.is_relative_to(file):
        return True
    return str(file).startswith(str(target.with_name(f".{target.name}.")))


def _error_number(error: OSError | SafetensorError) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))  # safetensors has the number in its text only
    return int(found[1]) if found else None


def _rename_to_free(made: Path, place: Path) -> bool:
    if os.path.lexists(place):
        return False
    try:
        made.rename(place)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            return False  # something came to be there just now
        raise
    return True


def _put_in_place(aside: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        os.replace(target, old)
    os.replace(aside, target)
    _flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
