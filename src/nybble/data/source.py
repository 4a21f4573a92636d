"""Rows from files, folders and hub datasets, in the order in which they stand there."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from nybble.errors import UserError, listed

_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "test"),
}
_CSV_FIELD_LIMIT = 2**31 - 1  # the default of 128 KiB is less than a long document
SHOWN_PROBLEMS = 5  # of a file's


@dataclass(frozen=True, slots=True)
class Row:
    """One record and where it stands, for messages."""

    fields: dict[str, Any]
    where: str


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """In place of a record; `reason` is the rest of a sentence that begins with its line."""

    reason: str


# A reader yields (number of the line or row, record or _Unreadable).
_Records = Iterator[tuple[int, Any]]


@dataclass(frozen=True)
class Source:
    """Where rows stand: in `files`, one after the other, or without any in a split of the hub dataset `path`."""

    path: str
    split: str
    subset: str | None
    max_rows: int | None
    files: tuple[Path, ...]

    @classmethod
    def find(cls, path: str, *, split: str = "train", subset: str | None = None, max_rows: int | None = None) -> Source:
        """A file, the files of a folder's `split`, or a split of a hub dataset; raises UserError if a file is missing.

        max_rows: how many of its first rows are meant.
        """
        local = Path(path).expanduser()
        files: list[Path] = []
        if local.is_dir():
            files = split_files(local, split)
            if not files:
                raise UserError(f"has no {split} file", where=local, fix=_folder_advice(local))
        elif local.is_file():
            files = [local]
        elif _looks_like_file(path):
            raise UserError("no such file", where=path)
        return cls(path, split, subset, max_rows, tuple(files))

    def rows(self) -> list[Row]:
        """Raises UserError for a source that is empty or cannot be had, and one that lists the malformed lines."""
        if not self.files:
            return self._hub_rows()
        rows: list[Row] = []
        for file in self.files:
            rows += _read_file(file, None if self.max_rows is None else self.max_rows - len(rows))
        if not rows:
            raise UserError("holds no rows", where=self.path)
        return rows

    def digest(self) -> str | None:
        """Of all that rows are read from, wherever files lie and whatever `max_rows`; None if there is no telling."""
        if not self.files:
            fingerprint = getattr(self._dataset, "_fingerprint", None)  # what datasets keeps its own results by
            return fingerprint and f"{self.path} {fingerprint}"
        digest = hashlib.sha256()
        try:
            for file in self.files:
                with file.open("rb") as stream:
                    digest.update(file.suffix.encode() + hashlib.file_digest(stream, "sha256").digest())
        except OSError:  # reading the rows says more about it
            return None
        return digest.hexdigest()

    @cached_property
    def _dataset(self) -> Any:
        import datasets

        try:
            return datasets.load_dataset(self.path, self.subset, split=self.split)
        # The library raises errors of its own, of the hub's client and of the network, without a common base.
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UserError(
                f"is neither a file nor a folder here, and could not be loaded from the hub: {reason}",
                where=self.path,
                fix="Check the spelling, data.split and data.subset, and whether the hub can be reached.",
            ) from error

    def _hub_rows(self) -> list[Row]:
        records = enumerate(islice(self._dataset, self.max_rows), start=1)
        rows = [Row(dict(record), f"{self.path}[{self.split}], row {number}") for number, record in records]
        if not rows:
            raise UserError(f"split {self.split!r} holds no rows", where=self.path)
        return rows


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a folder that hold a split: train.jsonl, valid.jsonl, train-00000-of-00002.parquet, data/train.csv.

    `validation` also stands for valid, val, dev, eval and test, the first of these that is there. A single data file
    of any name but these is the train split.
    """
    files = sorted(f for place in (folder, folder / "data") for f in place.glob("*") if f.suffix in _READERS)
    for name in _SPLIT_NAMES.get(split, (split,)):
        found = [file for file in files if _is_of(file, [name])]
        if found:
            return found
    single = files if split == "train" and len(files) == 1 else []
    return [file for file in single if not _is_of(file, _SPLIT_NAMES["validation"])]


def _is_of(file: Path, names: Iterable[str]) -> bool:
    return any(file.stem == name or file.stem.startswith((f"{name}-", f"{name}_")) for name in names)


def _looks_like_file(path: str) -> bool:
    return Path(path).suffix in _READERS or path.startswith((".", "/", "~")) or path.count("/") > 1


def _folder_advice(folder: Path) -> str:
    held = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(held[:SHOWN_PROBLEMS]) + (", ..." if len(held) > SHOWN_PROBLEMS else "")
    return (
        f"It holds {shown or 'nothing'}. Name the file train.jsonl (or .json, .parquet, .csv), or give the file itself."
    )


def _read_file(file: Path, limit: int | None) -> list[Row]:
    reader = _READERS.get(file.suffix)
    if reader is None:
        raise UserError(
            f"files that end in {file.suffix or 'nothing'!r} are not read",
            where=file,
            fix=f"Use one of {', '.join(_READERS)}.",
        )
    unit = "line" if file.suffix in (".jsonl", ".csv") else "row"
    rows: list[Row] = []
    problems: list[str] = []
    try:
        for number, record in islice(reader(file), limit):
            if isinstance(record, dict):
                rows.append(Row(record, f"{file}, {unit} {number}"))
            else:
                reason = record.reason if isinstance(record, _Unreadable) else f"is not an object but {record!r:.60}"
                problems.append(f"{unit} {number} {reason}")
    except PermissionError:
        raise UserError("no permission to read it", where=file) from None
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 text ({error.reason} at byte {error.start})", where=file) from None
    if problems:
        raise UserError(
            listed("cannot be read:", problems, most=SHOWN_PROBLEMS),
            where=file,
            fix="Mend or remove these, then start again.",
        )
    return rows


def _read_jsonl(file: Path) -> _Records:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _parse_line(line)


def _parse_line(line: bytes) -> Any:
    try:
        # Without its end: a line cut short would else be wrong at column 1, of the next line.
        return json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError:
        return _Unreadable("is not UTF-8 text")
    except json.JSONDecodeError as error:
        return _Unreadable(f"is not valid JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return _Unreadable("is nested too deeply")


def _read_json(file: Path) -> _Records:
    text = file.read_text(encoding="utf-8-sig")
    try:
        value = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        first_line = text.lstrip().partition("\n")[0]
        if error.msg == "Extra data" and isinstance(_parse_line(first_line.encode()), dict):
            yield from _read_jsonl(file)  # one object a line under the name .json is common
            return
        raise UserError(
            f"is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}", where=file
        ) from None
    except RecursionError:
        raise UserError("is nested too deeply", where=file) from None
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list):
        raise UserError("must hold a list of objects", where=file, fix="Or one object a line, in a .jsonl file.")
    yield from enumerate(value, start=1)


def _read_csv(file: Path) -> _Records:
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        for record in reader:
            extra = record.pop(None, None)
            yield reader.line_num, _Unreadable(f"has {len(extra)} cells more than the header") if extra else record


def _read_parquet(file: Path) -> _Records:
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]
    from pyarrow import ArrowInvalid

    try:
        table = parquet.ParquetFile(file)
        batches = table.iter_batches()
        records = (record for batch in batches for record in batch.to_pylist())
        yield from enumerate(records, start=1)
    except ArrowInvalid as error:
        raise UserError(f"is not a Parquet file, or is cut short: {error}", where=file) from None


_READERS: dict[str, Callable[[Path], _Records]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
