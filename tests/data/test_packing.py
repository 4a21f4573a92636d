"""Packing keeps every sample whole, once, and separate."""

from __future__ import annotations

import random

import pytest
import torch

from nybble.data.example import Example, single
from nybble.data.packing import best_fit, pack
from nybble.labels import IGNORED

PAD = 999


def samples(seed: int, count: int, longest: int) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    lengths = random.Random(seed).choices(range(1, longest + 1), k=count)
    return [
        single(
            torch.full((length,), row, dtype=torch.int32),
            torch.rand(length, generator=generator) < 0.5,
            row,
        )
        for row, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_every_sample_is_held_once_and_whole(seed: int) -> None:
    capacity = 8 + 8 * seed
    examples = samples(seed, 60, capacity)
    packed = pack(examples, capacity, pad_token_id=PAD)
    held = []
    for sequence in packed:
        assert len(sequence) == capacity
        parts = sequence.input_ids.split([*sequence.lengths, capacity - sum(sequence.lengths)])
        labels = sequence.labels.split([*sequence.lengths, capacity - sum(sequence.lengths)])
        assert torch.equal(parts[-1], torch.full_like(parts[-1], PAD))
        assert (labels[-1] == IGNORED).all()
        for part, part_labels in zip(parts[:-1], labels[:-1], strict=True):
            row = int(part[0])
            held.append(row)
            assert torch.equal(part, examples[row].input_ids)
            assert torch.equal(part_labels, examples[row].labels)
            assert part_labels[0] == IGNORED
    assert sorted(held) == list(range(60))
    assert sum(sequence.target_tokens for sequence in packed) == sum(example.target_tokens for example in examples)


def test_positions_begin_again_with_each_sample_and_with_the_padding() -> None:
    examples = [
        single(torch.ones(length, dtype=torch.int32), torch.ones(length, dtype=torch.bool), 0) for length in (3, 2)
    ]
    (packed,) = pack(examples, 8, pad_token_id=PAD)
    assert packed.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert packed.labels.tolist() == [-100, 1, 1, -100, 1, -100, -100, -100]
    (full,) = pack(examples, 5, pad_token_id=PAD)
    assert full.position_ids.tolist() == [0, 1, 2, 0, 1]


def test_bins_fill_best_and_keep_the_order_of_the_data() -> None:
    assert best_fit([5, 3, 7, 2, 3], 10) == [[0, 3, 4], [1, 2]]
    assert best_fit([10, 1, 10], 10) == [[0], [1], [2]]
    assert best_fit([], 10) == []


@pytest.mark.parametrize("seed", range(5))
def test_bins_are_few_and_the_same_every_time(seed: int) -> None:
    lengths = random.Random(seed).choices(range(1, 101), k=500)
    bins = best_fit(lengths, 100)
    assert all(sum(lengths[index] for index in held) <= 100 for held in bins)
    assert len(bins) <= 11 / 9 * -(-sum(lengths) // 100) + 1
    assert bins == best_fit(lengths, 100)
