"""Training, validation and test rows that share nothing, and the folder that holds them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nybble.files import check_writable, write_rows

Item = TypeVar("Item")
Row = Mapping[str, Any]

VALIDATION_SHARE = TEST_SHARE = 0.1


@dataclass(frozen=True)
class Splits:
    """Rows to train on, rows to choose settings by, and rows that no choice has seen."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]

    def write(self, folder: Path) -> None:
        """As train.jsonl, valid.jsonl and test.jsonl."""
        check_writable(folder)
        for name, rows in (("train", self.train), ("valid", self.validation), ("test", self.test)):
            write_rows(folder / f"{name}.jsonl", rows)


def split_by(items: Iterable[Item], key: Callable[[Item], str], row: Callable[[Item], Row]) -> Splits:
    """A tenth of the keys for validation, another for the test; items with the same key stay together, in order."""
    splits = Splits([], [], [])
    for item in items:
        at = place(key(item))
        held_out = splits.validation if at < VALIDATION_SHARE else splits.test
        (held_out if at < VALIDATION_SHARE + TEST_SHARE else splits.train).append(row(item))
    return splits


def place(text: str) -> float:
    """A number in [0, 1) that is the same on every machine, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
