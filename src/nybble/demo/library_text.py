"""Text to go on with: the source files of Python's own library, in pieces, split by module."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nybble.demo.docstrings import NO_LIBRARY, NOT_EVERYWHERE
from nybble.demo.splits import Splits, place, split_by

TABLES = {"encodings", "unicodedata"}  # letters and numbers, no text
PIECE_CHARACTERS = 1200  # 297 tokens of SmolLM2 on average; 2 % of the pieces are longer than 512


@dataclass(frozen=True)
class Piece:
    """Whole lines of a file; `file` is its path below the library."""

    file: str
    start: int
    text: str

    @property
    def module(self) -> str:
        """The top-level module: what the split goes by, as for the docstrings."""
        return self.file.partition("/")[0].removesuffix(".py")


def library_text(library: Path | None = None) -> Splits:
    """Rows of text from this Python's library, or another's; a tenth of the modules each for validation and test.

    Files are read, never imported. Pieces come in a fixed random order, so that any first part is a fair sample.
    """
    pieces = sorted(_pieces(library or Path(sysconfig.get_path("stdlib"))), key=lambda piece: place(str(piece)))
    return split_by(pieces, lambda piece: piece.module, lambda piece: {"text": piece.text, "file": piece.file})


def cut(text: str, longest: int = PIECE_CHARACTERS) -> list[str]:
    """Pieces of whole lines of at most so many characters, or of one line that is longer; together they are `text`."""
    pieces = [""]
    for line in text.splitlines(keepends=True):
        if pieces[-1] and len(pieces[-1]) + len(line) > longest:
            pieces.append("")
        pieces[-1] += line
    return pieces


def _pieces(root: Path) -> Iterator[Piece]:
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if (NO_LIBRARY | NOT_EVERYWHERE | TABLES).intersection(relative.with_suffix("").parts):
            continue
        if any(part.startswith(("_sysconfigdata", "config-")) for part in relative.parts):  # of this build alone
            continue
        for start, text in enumerate(cut(file.read_text(encoding="utf-8", errors="ignore"))):
            if text.strip():
                yield Piece(relative.as_posix(), start, text)
