"""Work in batches of sequences of like length, as many at a time as memory has room for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from nybble.memory.lack import is_out_of_memory

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_batches(
    items: Sequence[Item],
    run: Callable[[list[Item]], Sequence[Result]],
    *,
    length: Callable[[Item], int],
    batch_size: int,
    done: Callable[[int], None] = lambda _: None,
) -> list[Result]:
    """`run` over all items, the longest first so that memory runs out at once or not at all; results in items' order.

    A batch that does not fit is done again in halves, and no later one is larger. done: told how many were finished.
    """
    order = sorted(range(len(items)), key=lambda index: -length(items[index]))
    results: dict[int, Result] = {}
    while len(results) < len(order):
        batch = order[len(results) : len(results) + batch_size]
        found = _run_if_it_fits(run, [items[index] for index in batch])
        if found is None:
            batch_size = len(batch) // 2
            continue
        results.update(zip(batch, found, strict=True))
        done(len(batch))
    return [results[index] for index in range(len(items))]


def _run_if_it_fits(run: Callable[[list[Item]], Sequence[Result]], batch: list[Item]) -> Sequence[Result] | None:
    """None if it ran out of memory and a smaller batch can be tried."""
    try:
        return run(batch)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or len(batch) == 1:
            raise
    # Behind the handler: the exception holds the frames, and with them the tensors that were in the way.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
