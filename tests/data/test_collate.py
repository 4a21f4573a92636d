"""Batches: padding without effect, an order that only the seed decides, and the same work on any number of ranks."""

from __future__ import annotations

from itertools import zip_longest

import pytest
import torch

from nybble.data.collate import Batch, batches, collate, epoch_order, num_batches
from nybble.data.example import Example, single
from nybble.data.packing import pack
from nybble.labels import IGNORED


def sample(row: int, length: int) -> Example:
    ids = torch.arange(length, dtype=torch.int32) + 100 * row
    return single(ids, torch.arange(length) % 3 != 0, row)


EXAMPLES = [sample(row, 2 + row * 7 % 11) for row in range(13)]


def rows_of(batch: Batch) -> list[int]:
    return (batch.input_ids[:, 0] // 100).tolist()


def test_padding_is_on_the_right_without_loss_and_positions_go_on() -> None:
    batch = collate([sample(1, 3), sample(2, 5)], pad_token_id=7, pad_to_multiple=8)
    assert batch.input_ids.tolist() == [[100, 101, 102, 7, 7, 7, 7, 7], [200, 201, 202, 203, 204, 7, 7, 7]]
    assert batch.labels.tolist() == [
        [-100, 101, 102, *[-100] * 5],
        [-100, 201, 202, -100, 204, *[-100] * 3],
    ]
    assert batch.position_ids.tolist() == [list(range(8))] * 2
    assert batch.target_tokens == 5
    assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64


def test_packed_sequences_keep_their_positions() -> None:
    (packed,) = pack([sample(1, 3), sample(2, 2)], 6, pad_token_id=0)
    assert collate([packed], pad_to_multiple=4).position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]


def test_each_epoch_shows_every_example_once_in_an_order_of_its_own() -> None:
    orders = []
    for epoch in range(3):
        rows = [row for batch in batches(EXAMPLES, batch_size=4, seed=3, epoch=epoch) for row in rows_of(batch)]
        assert sorted(rows) == list(range(13))
        orders.append(rows)
    assert len({tuple(order) for order in orders}) == 3
    assert orders[1] == epoch_order(13, seed=3, epoch=1, shuffle=True)
    assert orders[0] != epoch_order(13, seed=4, epoch=0, shuffle=True)
    unshuffled = [row for batch in batches(EXAMPLES, batch_size=4, shuffle=False) for row in rows_of(batch)]
    assert unshuffled == list(range(13))


def test_the_order_is_the_same_on_every_machine() -> None:
    assert epoch_order(8, seed=0, epoch=0, shuffle=True) == [6, 4, 1, 7, 0, 5, 3, 2]


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_resuming_gives_the_rest(start: int) -> None:
    whole = [rows_of(batch) for batch in batches(EXAMPLES, batch_size=4, seed=1)]
    assert [rows_of(batch) for batch in batches(EXAMPLES, batch_size=4, seed=1, start=start)] == whole[start:]
    assert len(whole) == num_batches(13, 4) == 4
    on_a_rank = [rows_of(batch) for batch in batches(EXAMPLES, batch_size=2, seed=1, rank=1, world_size=2)]
    rest = batches(EXAMPLES, batch_size=2, seed=1, rank=1, world_size=2, start=start)
    assert [rows_of(batch) for batch in rest] == on_a_rank[start:]


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 7, 12, 13])
def test_ranks_together_do_what_one_process_does(world_size: int, batch_size: int, count: int) -> None:
    examples = EXAMPLES[:count]
    alone = list(batches(examples, batch_size=batch_size * world_size, seed=5))
    ranks = [
        list(batches(examples, batch_size=batch_size, seed=5, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert {len(rank) for rank in ranks} == {num_batches(count, batch_size, world_size)} == {len(alone)}
    for whole, *parts in zip_longest(alone, *ranks):
        with_loss = [part for part in parts if part.target_tokens]
        assert sorted(row for part in with_loss for row in rows_of(part)) == sorted(rows_of(whole))
        assert sum(part.target_tokens for part in parts) == whole.target_tokens
        assert all((part.labels != IGNORED).sum() == part.target_tokens for part in parts)
        sizes = [len(rows_of(part)) if part.target_tokens else 0 for part in parts]
        assert max(sizes) <= min(batch_size, min(sizes) + 1)  # the work is shared evenly, in the last one too


def test_accumulated_micro_batches_are_the_larger_batch() -> None:
    small = list(batches(EXAMPLES[:12], batch_size=2, seed=2))
    large = list(batches(EXAMPLES[:12], batch_size=4, seed=2))
    assert [rows_of(a) + rows_of(b) for a, b in zip(small[::2], small[1::2], strict=True)] == [
        rows_of(b) for b in large
    ]


def test_to_moves_all_tensors() -> None:
    moved = collate(EXAMPLES[:2]).to("meta")
    assert {moved.input_ids.device.type, moved.labels.device.type, moved.position_ids.device.type} == {"meta"}
    assert moved.target_tokens == collate(EXAMPLES[:2]).target_tokens
