"""The demo's data: the same every time, and no module on both sides of the split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nybble.demo.docstrings import collect_pairs, split_by_module, write_pairs
from nybble.errors import UserError


@pytest.fixture(scope="module")
def pairs():
    return collect_pairs()


@pytest.fixture
def library(tmp_path: Path) -> Path:
    root = tmp_path / "lib"
    (root / "pkg").mkdir(parents=True)
    (root / "tkinter").mkdir()
    (root / "pkg" / "__init__.py").write_text(
        'import does_not_exist\n\ndef f():\n    """Say what\n    is wanted here.\n\n    Rest."""\n'
        'def _hidden():\n    """This one must not be found."""\n'
    )
    (root / "pkg" / "m.py").write_text(
        'class C:\n    """A class of things to count."""\n'
        '    async def g(self):\n        """Wait for what is to come."""\n'
        '    def same(self):\n        """Say what is wanted here."""\n    def short(self):\n        """See."""\n'
    )
    (root / "pkg" / "_private.py").write_text('def h():\n    """Nobody shall ask for this one."""\n')
    (root / "tkinter" / "w.py").write_text('def w():\n    """Not everywhere is this installed."""\n')
    return root


def test_what_is_asked_and_answered(library: Path) -> None:
    assert {(pair.question, pair.answer) for pair in collect_pairs(library)} == {
        ("What does Python's pkg.f do?", "Say what is wanted here."),
        ("What is Python's pkg.m.C?", "A class of things to count."),
        ("What does Python's pkg.m.C.g do?", "Wait for what is to come."),
    }


def test_several_thousand_pairs_the_same_every_time(pairs) -> None:
    assert len(pairs) > 2000
    assert pairs == collect_pairs()
    assert len({pair.answer for pair in pairs}) == len(pairs)


def test_no_module_is_on_both_sides(pairs) -> None:
    split = split_by_module(pairs)
    assert len(split.train) + len(split.validation) == len(pairs)
    assert not {pair.module for pair in split.train} & {pair.module for pair in split.validation}
    assert len({pair.module for pair in split.validation}) >= 5
    assert split_by_module(pairs, 50).validation == split.validation[:50]


def test_files_hold_the_messages_format(library: Path, tmp_path: Path) -> None:
    written = write_pairs(tmp_path / "data", library=library)
    rows = [json.loads(line) for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines()]
    assert rows == [pair.row() for pair in written.train]
    assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant"]
    assert (tmp_path / "data" / "valid.jsonl").read_text() == ""  # one module only, and it is for training


def test_a_python_without_sources(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no Python sources"):
        collect_pairs(tmp_path)
