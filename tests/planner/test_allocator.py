"""The allocator's rules, on sequences whose outcome follows from them by hand."""

from __future__ import annotations

import random

import pytest

from nybble.planner.allocator import MIB, Allocator


def taken(*sizes: float) -> Allocator:
    pool = Allocator()
    for number, size in enumerate(sizes):
        pool.take((number, "x"), int(size))
    return pool


@pytest.mark.parametrize(
    ("sizes", "reserved"),
    [
        ([512], 2 * MIB),
        ([MIB, MIB], 2 * MIB),
        ([MIB, MIB, 512], 4 * MIB),
        ([8 * MIB, 8 * MIB, 4 * MIB], 20 * MIB),
        ([8 * MIB, 8 * MIB, 5 * MIB], 40 * MIB),
        ([11 * MIB, 9 * MIB], 20 * MIB),
        ([512, 11 * MIB, 100 * MIB], 122 * MIB),
    ],
)
def test_it_grows_by_pages(sizes: list[int], reserved: int) -> None:
    pool = taken(*sizes)
    assert pool.reserved == reserved
    assert pool.allocated == sum(sizes)


def test_the_smallest_block_that_is_large_enough_is_taken() -> None:
    pool = taken(100 * MIB, 20 * MIB, 40 * MIB, 20 * MIB, 60 * MIB)
    for number in (0, 2, 4):
        pool.drop((number, "x"))
    pool.take((5, "x"), 30 * MIB)
    pool.take((6, "x"), 95 * MIB)
    pool.take((7, "x"), 60 * MIB)
    assert pool.reserved == 240 * MIB
    pool.take((8, "x"), 12 * MIB)  # 10 and 5 MiB are left
    assert pool.reserved == 260 * MIB


def test_neighbours_that_are_free_are_joined() -> None:
    pool = taken(60 * MIB)
    pool.drop((0, "x"))
    for number in range(1, 4):
        pool.take((number, "x"), 20 * MIB)
    for number in (1, 3, 2):
        pool.drop((number, "x"))
    pool.take((4, "x"), 60 * MIB)
    assert pool.reserved == 60 * MIB


def test_it_grows_by_what_its_free_end_lacks() -> None:
    pool = taken(40 * MIB, 50 * MIB)  # 10 MiB are left of 100
    pool.drop((1, "x"))
    pool.take((2, "x"), 80 * MIB)
    assert pool.reserved == 120 * MIB
    pool.drop((0, "x"))
    pool.drop((2, "x"))  # all is one block again
    pool.take((3, "x"), 120 * MIB)
    assert pool.reserved == 120 * MIB


def test_its_end_is_taken_last() -> None:
    pool = taken(60 * MIB, 20 * MIB, 40 * MIB)
    pool.drop((2, "x"))
    pool.drop((0, "x"))
    pool.take((3, "x"), 40 * MIB)  # of the 60 at the beginning, though the end is of just this size
    pool.take((4, "x"), 60 * MIB)
    assert pool.reserved == 140 * MIB


def test_pages_that_nothing_lies_on_are_given_back() -> None:
    pool = taken(50 * MIB, 30 * MIB, 10 * MIB)
    pool.drop((0, "x"))
    assert pool.give_back().reserved == 100 * MIB - 40 * MIB


def test_nothing_is_lost_in_a_long_random_run() -> None:
    pool, generator = Allocator(), random.Random(0)
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
    pool.take((0, "as large as the largest"), largest)  # all is one block again
    assert pool.reserved == reserved
