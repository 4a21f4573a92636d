"""The kernels that give both gradients of low-rank pairs. Four programs share the work under the interpreter, so most
stripes are shared; bf16 is left to the GPU, as the interpreter truncates casts to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nybble.ops.stripes import Stripes
from nybble.ops.triton import low_rank as kernels
from nybble.ops.triton.launch import CARDS, Card
from tests.ops.test_low_rank import SCALING, assert_half_is_right, both, pair_tensors


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that an op allocates is full of NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


# Whole stripes; parts that end inside a stripe; odd widths, and more stripes than are summed at once.
@pytest.mark.parametrize("sizes", [[256], [256, 64, 64], [300, 40, 40], [701, 5]], ids=str)
# One tile; the last tile short; a program with tiles of two stripes.
@pytest.mark.parametrize("tokens", [1, 70, 290])
@pytest.mark.parametrize("r", [3, 20])
def test_kernels(sizes: list[int], tokens: int, r: int) -> None:
    tensors = pair_tensors(tokens, r, sizes, torch.float16)
    assert_half_is_right(both(kernels.low_rank_backward_, tensors, sizes), tensors, sizes)


def test_the_gradient_of_b_is_added_to_what_is_there() -> None:
    tensors, sizes = pair_tensors(70, 3, [300, 40], torch.float16), [300, 40]
    _, alone = both(kernels.low_rank_backward_, tensors, sizes)
    d_B = torch.ones(340, 3)
    kernels.low_rank_backward_(d_B, *tensors, SCALING, sizes)
    assert torch.equal(d_B, 1 + alone)


def test_what_the_kernels_are_for() -> None:
    assert kernels.handles(torch.empty(4, 8, dtype=torch.float16), 16)
    assert not kernels.handles(torch.empty(4, 8, dtype=torch.float16), 17), "Turing multiplies without Triton's help"
    assert not kernels.handles(torch.empty(4, 8), 16)
    assert not kernels.handles(torch.empty(0, 8, dtype=torch.float16), 16)


@pytest.mark.parametrize("card", CARDS, ids=str)
@pytest.mark.parametrize("tokens", [2048, 8192])
@pytest.mark.parametrize("sizes", [(1024,), (4096,), (4096, 1024, 1024), (14336, 14336), (1536, 1536)], ids=str)
def test_programs_end_together(card: Card, tokens: int, sizes: tuple[int, ...]) -> None:
    """The last program's share leaves a twentieth of the card's time unused at most; 132 multiprocessors."""
    how = Stripes.of(card.capability, 132, tokens, 16, sizes)
    tiles = -(-tokens // how.rows) * how.count
    slots = 132 if card.capability == (9, 0) else 264
    assert how.programs <= slots
    assert how.programs * how.tiles_per_program >= tiles >= 0.95 * slots * how.tiles_per_program
