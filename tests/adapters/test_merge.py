from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble.adapters.merge import MergeStats, merged_weight, replaced_weight, row_blocks
from nybble.adapters.saved import LowRankPair

OUT, IN, R = 37, 24, 4


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(*, dora: bool = False, scaling: float = 2.5, dtype: torch.dtype = torch.float32) -> LowRankPair:
    magnitude = random(OUT, seed=3).abs() + 0.5 if dora else None
    return LowRankPair(random(R, IN, seed=1).to(dtype), random(OUT, R, seed=2).to(dtype), magnitude, scaling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_sum_is_exact_and_rounded_once(dtype: torch.dtype, held: torch.dtype, dora: bool) -> None:
    weight, adapter = random(OUT, IN, seed=0).to(dtype), pair(dora=dora, dtype=held)
    merged, _ = merged_weight(weight, adapter, dtype)
    expected = weight.float() + adapter.scaling * (adapter.B.float() @ adapter.A.float())
    if adapter.magnitude is not None:
        expected *= (adapter.magnitude / torch.linalg.vector_norm(expected, dim=1)).unsqueeze(1)
    assert torch.equal(merged, expected.to(dtype))
    assert torch.equal(merged_weight(weight, adapter, torch.float32)[0], expected)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 36, 37, 1000])
def test_blocks_of_rows_make_the_same_weight(monkeypatch: pytest.MonkeyPatch, dora: bool, rows: int) -> None:
    weight, adapter = random(OUT, IN, seed=0).bfloat16(), pair(dora=dora)
    whole, stats = merged_weight(weight, adapter, torch.float32)
    monkeypatch.setattr("nybble.adapters.merge._BLOCK_VALUES", rows * IN)
    blocks, counted = [], MergeStats()
    for taken in row_blocks((OUT, IN)):
        merged, changed = merged_weight(weight[taken], adapter.rows(taken), torch.float32)
        blocks.append(merged)
        counted += changed
    assert max(map(len, blocks)) == min(rows, OUT)
    # A product over fewer rows may add its r terms in another order: an ulp of the largest term.
    torch.testing.assert_close(torch.cat(blocks), whole, rtol=1e-6, atol=2e-6)
    assert counted.touched == stats.touched == OUT * IN
    assert counted.largest_delta == pytest.approx(stats.largest_delta)


@pytest.mark.parametrize("shape", [(37, 24), (37,), (1, 24), (0, 24), (9, 2, 12)])
@pytest.mark.parametrize("multiple_of", [1, 8])
def test_blocks_of_rows_cover_a_weight_once(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], multiple_of: int
) -> None:
    monkeypatch.setattr("nybble.adapters.merge._BLOCK_VALUES", 10 * 24)
    blocks = list(row_blocks(shape, multiple_of=multiple_of))
    assert [row for block in blocks for row in range(shape[0])[block]] == list(range(shape[0]))
    assert all(block.start % multiple_of == 0 for block in blocks)


def test_a_transposed_weight_is_merged_as_it_lies() -> None:
    """GPT-2's files hold (in, out); what is merged is a view of it."""
    weight = random(IN, OUT, seed=0)
    found, expected = (merged_weight(held, pair(), torch.float32)[0] for held in (weight.T, weight.T.contiguous()))
    assert torch.equal(found, expected)


def test_what_rounding_swallows_is_counted() -> None:
    weight = torch.ones(4, 8, dtype=torch.bfloat16)
    A, B = torch.ones(1, 8), torch.tensor([[0.0], [2**-10], [2**-6], [-(2**-12)]])
    merged, stats = merged_weight(weight, LowRankPair(A, B, None, 1.0), torch.bfloat16)
    assert stats == MergeStats(touched=24, swallowed=16, largest_delta=2**-6)
    assert (merged[2] == 1 + 2**-6).all()
    assert (merged[[0, 1, 3]] == 1).all()
    assert (stats + MergeStats(8, 0, 5.0)).swallowed_share == 0.5
    assert (stats + MergeStats(8, 0, 5.0)).largest_delta == 5.0


def test_a_weight_trained_whole_is_rounded_once() -> None:
    weight, trained = random(OUT, seed=0).bfloat16(), random(OUT, seed=0) + 1e-4
    result, stats = replaced_weight(weight, trained, torch.bfloat16)
    assert torch.equal(result, trained.bfloat16())
    assert stats.touched == OUT
    assert 0 < stats.swallowed < OUT
