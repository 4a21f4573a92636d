"""Rows come in order from every kind of source, and what is wrong is named with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from nybble.data.source import Row, Source, split_files
from nybble.errors import UserError

ROWS: list[dict[str, Any]] = [{"prompt": f"question {i}", "completion": "Größe,\n" * i + "end"} for i in range(4)]


def load_rows(path: str, **options: Any) -> list[Row]:
    return Source.find(path, **options).rows()


def write(folder: Path, name: str, rows: list[dict[str, Any]] = ROWS) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif file.suffix == ".csv":
        quoted = [["prompt", "completion"], *([row["prompt"], row["completion"]] for row in rows)]
        file.write_text(
            "".join(",".join(f'"{cell}"' for cell in line) + "\r\n" for line in quoted), encoding="utf-8-sig"
        )
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows), encoding="utf-8")
    else:
        file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    return file


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.csv"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, name)
    assert [row.fields for row in load_rows(str(file))] == ROWS
    assert [row.fields for row in load_rows(str(file), max_rows=2)] == ROWS[:2]


def test_json_under_other_shapes(tmp_path: Path) -> None:
    lines = write(tmp_path, "lines.jsonl").rename(tmp_path / "lines.json")
    assert [row.fields for row in load_rows(str(lines))] == ROWS
    nested = tmp_path / "nested.json"
    nested.write_text(json.dumps({"version": 1, "data": ROWS}))
    assert [row.fields for row in load_rows(str(nested))] == ROWS
    nested.write_text('{"a": 1}')
    with pytest.raises(UserError, match="list of objects"):
        load_rows(str(nested))
    nested.write_text('[{"a": 1},\n {"a" 1}]')
    with pytest.raises(UserError, match="line 2, column 7"):
        load_rows(str(nested))


def test_malformed_lines_are_listed_by_number(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b'{"text": "a"}\n{"text": \n\n[1]\n{"text": "\xff"}\n')
    with pytest.raises(UserError) as caught:
        load_rows(str(file))
    assert caught.value.where == str(file)
    assert "line 2 is not valid JSON: Expecting value at column 9" in caught.value.what
    assert "line 4 is not an object but [1]" in caught.value.what
    assert "line 5 is not UTF-8 text" in caught.value.what
    file.write_text("{\n" * 30)
    with pytest.raises(UserError, match="and 25 more"):
        load_rows(str(file))


def test_lines_keep_their_numbers_past_empty_ones(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('\n{"text": "a"}\n\n{"text": "b"}\n')
    assert [row.where for row in load_rows(str(file))] == [f"{file}, line 2", f"{file}, line 4"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "\n", "holds no rows"),
        ("a.json", "", "holds no rows"),
        ("a.csv", "prompt,completion\n", "holds no rows"),
        ("a.csv", "prompt,completion\na,b\na,b,c\n", "line 3 has 1 cells more than the header"),
        ("a.parquet", "PAR1 and no more", "not a Parquet file"),
        ("a.jsonl", "\n" + "[" * 10_000, "line 2 is nested too deeply"),
        ("a.json", "[" * 10_000, "is nested too deeply"),
        ("a.txt", "hello", r"end in '\.txt' are not read"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: str, message: str) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_rows(str(file))
    assert caught.value.where == str(file)


def test_a_folder_gives_its_splits(tmp_path: Path) -> None:
    write(tmp_path, "train-00001-of-00002.parquet", ROWS[2:])
    write(tmp_path, "train-00000-of-00002.parquet", ROWS[:2])
    write(tmp_path, "data/test.jsonl", ROWS[:1])
    assert [row.fields for row in load_rows(str(tmp_path))] == ROWS
    assert [row.fields for row in load_rows(str(tmp_path), max_rows=3)] == ROWS[:3]
    assert [row.fields for row in load_rows(str(tmp_path), split="validation")] == ROWS[:1]
    write(tmp_path, "valid.jsonl", ROWS[:2])
    assert [file.name for file in split_files(tmp_path, "validation")] == ["valid.jsonl"]


def test_held_out_rows_alone_are_not_trained_on(tmp_path: Path) -> None:
    write(tmp_path, "test.jsonl")
    with pytest.raises(UserError, match=r"no train file\nIt holds test.jsonl"):
        load_rows(str(tmp_path))


def test_a_folder_without_the_split_says_what_it_holds(tmp_path: Path) -> None:
    write(tmp_path, "pairs.jsonl")
    assert len(load_rows(str(tmp_path))) == 4  # a single file needs no name
    write(tmp_path, "more.jsonl")
    with pytest.raises(UserError, match=r"no train file\nIt holds more.jsonl, pairs.jsonl"):
        load_rows(str(tmp_path))


@pytest.mark.parametrize("path", ["missing.jsonl", "./missing", "/no/such/folder", "a/b/c"])
def test_missing_files_are_not_looked_for_on_the_hub(path: str) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_rows(path)


def test_a_hub_dataset_gives_its_split_and_unreachable_ones_are_named(tmp_path: Path) -> None:
    write(tmp_path / "set", "train.parquet")
    name = str(tmp_path / "set")
    source = Source(name, "train", None, max_rows=3, files=())
    rows = source.rows()
    assert [row.fields for row in rows] == ROWS[:3]
    assert source.digest() == Source(name, "train", None, max_rows=None, files=()).digest()
    write(tmp_path / "set", "train.parquet", ROWS[1:])
    assert source.digest() != Source(name, "train", None, max_rows=None, files=()).digest() != None  # noqa: E711
    assert rows[2].where.endswith("[train], row 3")
    with pytest.raises(UserError, match="could not be loaded from the hub") as caught:
        load_rows("nobody/nothing")
    assert caught.value.where == "nobody/nothing"
