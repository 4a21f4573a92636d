"""Batches of like length, smaller ones where memory runs out."""

from __future__ import annotations

import random

import pytest

from nybble.evaluation.batching import in_batches


def test_results_come_in_the_order_of_the_items() -> None:
    items = ["x" * random.Random(i).randint(1, 50) for i in range(37)]
    batches: list[list[str]] = []
    counts: list[int] = []

    def run(batch: list[str]) -> list[int]:
        batches.append(batch)
        return [len(item) * 2 for item in batch]

    assert in_batches(items, run, length=len, batch_size=8, done=counts.append) == [len(item) * 2 for item in items]
    assert [len(batch) for batch in batches] == counts == [8, 8, 8, 8, 5]
    lengths = [len(item) for batch in batches for item in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert in_batches([], run, length=len, batch_size=8) == []


def test_batches_shrink_until_they_fit() -> None:
    tried: list[int] = []

    def run(batch: list[str]) -> list[str]:
        tried.append(len(batch))
        if len(batch) > 3:
            raise MemoryError
        return batch

    items = [str(i) for i in range(10)]
    assert in_batches(items, run, length=len, batch_size=16) == items
    assert tried == [10, 5, 2, 2, 2, 2, 2]


def test_what_never_fits_is_an_error() -> None:
    def too_large(_: list[str]) -> list[str]:
        raise MemoryError("one alone")

    with pytest.raises(MemoryError, match="one alone"):
        in_batches(["a", "b"], too_large, length=len, batch_size=2)

    def wrong(_: list[str]) -> list[str]:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        in_batches(["a", "b"], wrong, length=len, batch_size=2)
