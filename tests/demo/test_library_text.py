"""The library's text in pieces: nothing lost, nothing shared between splits."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

from nybble.demo.docstrings import collect_pairs, docstring_rows, split_by_module
from nybble.demo.library_text import cut, library_text
from nybble.demo.splits import split_by


def test_pieces_are_whole_lines() -> None:
    draw = random.Random(0)
    text = "".join("x" * draw.randint(0, 90) + "\n" for _ in range(200)) + "y" * 700 + "\nend"
    pieces = cut(text, 500)
    assert "".join(pieces) == text
    assert all(piece.endswith("\n") for piece in pieces[:-1])
    assert [piece for piece in pieces if len(piece) > 500] == ["y" * 700 + "\n"]
    assert all(len(one) + len(next_one.partition("\n")[0]) >= 500 for one, next_one in pairwise(pieces))


def test_no_module_is_on_two_sides() -> None:
    splits = library_text()
    modules = [
        {row["file"].partition("/")[0].removesuffix(".py") for row in rows}
        for rows in (splits.train, splits.validation, splits.test)
    ]
    assert all(modules)
    assert not modules[0] & modules[1] | modules[0] & modules[2] | modules[1] & modules[2]
    assert library_text() == splits
    assert [row["file"] for row in splits.train] != sorted(row["file"] for row in splits.train)


def test_what_other_machines_may_lack_is_left_out(tmp_path: Path) -> None:
    for name in ("one.py", "tkinter/two.py", "test/three.py", "site-packages/four.py", "_sysconfigdata__x86.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    splits = library_text(tmp_path)
    assert [row["file"] for rows in (splits.train, splits.validation, splits.test) for row in rows] == ["one.py"]


def test_docstrings_have_a_test_split_beside_the_same_validation_rows() -> None:
    splits = docstring_rows()
    pairs = split_by_module(collect_pairs())
    assert splits.validation == [pair.row() for pair in pairs.validation]
    assert len(splits.test) > 50
    assert len(splits.train) + len(splits.test) == len(pairs.train)


def test_items_of_a_key_stay_together(tmp_path: Path) -> None:
    items = [(f"key {number % 100}", number) for number in range(1000)]
    splits = split_by(items, lambda item: item[0], lambda item: {"text": str(item[1])})
    parts = [{int(row["text"]) % 100 for row in rows} for rows in (splits.train, splits.validation, splits.test)]
    assert sum(map(len, parts)) == 100
    assert 3 <= len(parts[1]) <= 20
    assert 3 <= len(parts[2]) <= 20
    splits.write(tmp_path / "data")
    assert sorted(file.name for file in (tmp_path / "data").iterdir()) == ["test.jsonl", "train.jsonl", "valid.jsonl"]
