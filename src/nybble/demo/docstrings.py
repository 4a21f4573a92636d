"""Questions and answers from the docstrings of Python's own standard library.

Source files are parsed, never imported, so nothing runs. The pairs are the same on every machine with one version of
Python: packages that distributions leave out or add to are skipped.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from nybble.demo.splits import Splits, place, split_by
from nybble.errors import UserError
from nybble.files import check_writable, write_rows

NO_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "lib-dynload"}
# tkinter and turtle are a package of their own on Debian, distutils is patched there and gone from Python 3.12.
NOT_EVERYWHERE = {"tkinter", "turtle", "distutils", "sitecustomize", "site-packages", "dist-packages"}
SHORTEST, LONGEST = 20, 400  # characters of an answer: "See above." teaches nothing, and a page is cut anyway
HELD_OUT_SHARE = 0.1  # of the modules, not of the pairs

Definition: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class DocPair:
    """`name` is the full name of a function or class of the library, `answer` the first paragraph of its docstring."""

    name: str
    question: str
    answer: str

    @property
    def module(self) -> str:
        """The top-level module: what the split goes by."""
        return self.name.partition(".")[0]

    def row(self) -> dict[str, list[dict[str, str]]]:
        """The pair in the `messages` format."""
        return {
            "messages": [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}],
        }


@dataclass(frozen=True)
class DocPairs:
    train: list[DocPair]
    validation: list[DocPair]


def collect_pairs(library: Path | None = None) -> list[DocPair]:
    """Every documented public function and class below `library` (this Python's own); each distinct answer once."""
    root = library or Path(sysconfig.get_path("stdlib"))
    found: dict[str, DocPair] = {}
    for file in sorted(root.rglob("*.py")):
        for pair in _pairs_of(file, root):
            # Many docstrings are repeated word for word; kept once, no held-out answer is seen in training.
            found.setdefault(pair.answer, pair)
    if not found:
        raise UserError("holds no Python sources with docstrings", where=root, fix="Use a Python with its library.")
    # Sorted by hash: a fixed order in which any first part is a fair sample.
    return sorted(found.values(), key=lambda pair: place(pair.name))


def split_by_module(pairs: Iterable[DocPair], validation_pairs: int | None = None) -> DocPairs:
    """Hold out a tenth of the modules; at most `validation_pairs` of their pairs are kept."""
    train: list[DocPair] = []
    validation: list[DocPair] = []
    for pair in pairs:
        (validation if place(pair.module) < HELD_OUT_SHARE else train).append(pair)
    return DocPairs(train, validation[:validation_pairs])


def docstring_rows(library: Path | None = None) -> Splits:
    """All pairs as rows; validation rows are those of `split_by_module`, test rows are of another tenth of modules."""
    return split_by(collect_pairs(library), lambda pair: pair.module, lambda pair: pair.row())


def write_pairs(folder: Path, validation_pairs: int | None = None, *, library: Path | None = None) -> DocPairs:
    """Write `train.jsonl` and `valid.jsonl` into `folder`, in the `messages` format, and return what was written."""
    pairs = split_by_module(collect_pairs(library), validation_pairs)
    check_writable(folder)
    for name, part in (("train", pairs.train), ("valid", pairs.validation)):
        write_rows(folder / f"{name}.jsonl", (pair.row() for pair in part))
    return pairs


def _pairs_of(file: Path, root: Path) -> Iterator[DocPair]:
    parts = file.relative_to(root).with_suffix("").parts
    private = any(part.startswith(("_", "config-")) and part != "__init__" for part in parts)
    if private or (NO_LIBRARY | NOT_EVERYWHERE).intersection(parts):
        return
    module = ".".join(part for part in parts if part != "__init__")
    for name, node in _public_definitions(ast.parse(file.read_bytes()), module):
        answer = _first_paragraph(ast.get_docstring(node) or "")
        if SHORTEST <= len(answer) <= LONGEST:
            yield DocPair(name, _question(name, node), answer)


def _public_definitions(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, Definition]]:
    for child in node.body:
        if not isinstance(child, Definition) or child.name.startswith("_"):
            continue
        name = f"{prefix}.{child.name}"
        yield name, child
        if isinstance(child, ast.ClassDef):
            yield from _public_definitions(child, name)


def _question(name: str, node: Definition) -> str:
    return f"What is Python's {name}?" if isinstance(node, ast.ClassDef) else f"What does Python's {name} do?"


def _first_paragraph(docstring: str) -> str:
    return re.sub(r"\s+", " ", docstring.strip().partition("\n\n")[0]).strip()
