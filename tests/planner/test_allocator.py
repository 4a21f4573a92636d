"""The allocator's rules, on sequences whose outcome follows from them by hand."""

from __future__ import annotations

import random

import pytest

from nybble.planner.allocator import MIB, Allocator, ExpandableAllocator


def taken(*sizes: float, pool: Allocator | None = None) -> Allocator:
    pool = pool or Allocator()
    for number, size in enumerate(sizes):
        pool.take((number, "x"), int(size))
    return pool


@pytest.mark.parametrize(
    ("sizes", "reserved"),
    [
        ([512], 2 * MIB),
        ([MIB, MIB], 2 * MIB),
        ([MIB, MIB, 512], 4 * MIB),
        ([MIB + 512], 20 * MIB),
        ([8 * MIB, 8 * MIB, 4 * MIB], 20 * MIB),
        ([8 * MIB, 8 * MIB, 5 * MIB], 40 * MIB),
        ([10 * MIB], 10 * MIB),
        ([11 * MIB], 12 * MIB),
        ([512, 11 * MIB, 100 * MIB], 114 * MIB),
    ],
)
def test_segments(sizes: list[int], reserved: int) -> None:
    assert taken(*sizes).reserved == reserved


def test_what_is_left_of_a_large_block_is_split_off_above_1_mib() -> None:
    assert taken(10.5 * MIB).allocated == 10.5 * MIB
    assert taken(11.5 * MIB).allocated == 12 * MIB  # 0.5 MiB of the segment goes with it
    assert taken(10.5 * MIB, 1.5 * MIB).reserved == 12 * MIB


def test_the_smallest_block_that_is_large_enough_is_taken() -> None:
    pool = taken(100 * MIB, 40 * MIB, 60 * MIB)
    for number in range(3):
        pool.drop((number, "x"))
    pool.take((3, "x"), 30 * MIB)
    pool.take((4, "x"), 95 * MIB)
    pool.take((5, "x"), 60 * MIB)
    assert pool.reserved == 200 * MIB
    pool.take((6, "x"), 12 * MIB)  # 10 and 5 MiB are left
    assert pool.reserved == 212 * MIB


def test_neighbours_that_are_free_are_joined() -> None:
    pool = taken(60 * MIB)
    pool.drop((0, "x"))
    for number in range(1, 4):
        pool.take((number, "x"), 20 * MIB)
    for number in (1, 3, 2):
        pool.drop((number, "x"))
    pool.take((4, "x"), 60 * MIB)
    assert pool.reserved == 60 * MIB


@pytest.mark.parametrize(
    ("sizes", "reserved"),
    [
        ([512], 2 * MIB),
        ([MIB + 512], 20 * MIB),
        ([11 * MIB, 9 * MIB], 20 * MIB),
        ([512, 11 * MIB, 100 * MIB], 122 * MIB),
    ],
)
def test_an_expandable_segment_grows_by_pages(sizes: list[int], reserved: int) -> None:
    pool = taken(*sizes, pool=ExpandableAllocator())
    assert pool.reserved == reserved
    assert pool.allocated == sum(sizes)


def test_an_expandable_segment_grows_by_what_its_free_end_lacks() -> None:
    pool = taken(40 * MIB, 50 * MIB, pool=ExpandableAllocator())  # 10 MiB are left of 100
    pool.drop((1, "x"))
    pool.take((2, "x"), 80 * MIB)
    assert pool.reserved == 120 * MIB
    pool.drop((0, "x"))
    pool.drop((2, "x"))  # all is one block again
    pool.take((3, "x"), 120 * MIB)
    assert pool.reserved == 120 * MIB


def test_the_end_of_an_expandable_segment_is_taken_last() -> None:
    pool = taken(60 * MIB, 20 * MIB, 40 * MIB, pool=ExpandableAllocator())
    pool.drop((2, "x"))
    pool.drop((0, "x"))
    pool.take((3, "x"), 40 * MIB)  # of the 60 at the beginning, though the end is of just this size
    pool.take((4, "x"), 60 * MIB)
    assert pool.reserved == 140 * MIB


@pytest.mark.parametrize("kind", [Allocator, ExpandableAllocator])
def test_nothing_is_lost_in_a_long_random_run(kind: type[Allocator]) -> None:
    pool, generator = kind(), random.Random(0)
    held: dict[tuple[int, str], int] = {}
    largest = 0
    for number in range(3000):
        if held and generator.random() < 0.5:
            key = generator.choice(list(held))
            del held[key]
            pool.drop(key)
        else:
            key = number, "x"
            held[key] = 512 * generator.randint(1, 200_000)
            pool.take(key, held[key])
            largest = max(largest, held[key])
        assert sum(held.values()) <= pool.allocated <= pool.reserved
    for key in held:
        pool.drop(key)
    assert pool.allocated == 0
    assert pool.reserved >= pool.most_allocated > 0
    reserved = pool.reserved
    pool.take((0, "as large as the largest"), largest)  # segments are whole again
    assert pool.reserved == reserved
