"""Several samples in one sequence of fixed length, none of them split, with little padding."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import torch

from nybble.data.example import Example


def pack(examples: Sequence[Example], length: int, *, pad_token_id: int) -> list[Example]:
    """Sequences of exactly `length` tokens that hold every example once. Same input, same result.

    Padding comes last, as a sample of its own without loss. Sequences, and the samples in each, keep the order of
    the data as far as the filling allows.
    """
    bins = best_fit([len(example) for example in examples], length)
    return [_join([examples[index] for index in held], length, pad_token_id) for held in bins]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in bins of `capacity`: the longest first, each into the fullest bin that still has room.

    At most 11/9 of the fewest bins possible, plus one (best-fit decreasing; Johnson, 1974).
    """
    bins: list[list[int]] = []
    rooms: list[int] = []  # the distinct amounts of room left, sorted
    with_room: dict[int, list[int]] = {}  # room left -> bins that have it
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(rooms, lengths[index])
        if at == len(rooms):
            room, target = capacity, len(bins)
            bins.append([])
        else:
            room = rooms[at]
            target = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        bins[target].append(index)
        left = room - lengths[index]
        if left not in with_room:
            bisect.insort(rooms, left)
        with_room.setdefault(left, []).append(target)
    return sorted(sorted(held) for held in bins)


def _join(examples: list[Example], length: int, pad_token_id: int) -> Example:
    padding = length - sum(len(example) for example in examples)
    assert padding >= 0, "samples are cut to the length of a sequence before they are packed"
    pads = torch.full((padding,), pad_token_id, dtype=torch.int32)
    return Example(
        input_ids=torch.cat([*(example.input_ids for example in examples), pads]),
        trained=torch.cat([*(example.trained for example in examples), torch.zeros(padding, dtype=torch.bool)]),
        lengths=tuple(length for example in examples for length in example.lengths),
        row=examples[0].row,
    )
