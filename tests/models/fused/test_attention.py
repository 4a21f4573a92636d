"""Attention by FlexAttention, uncompiled, against the definition; other ways are a GPU's."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from nybble.models.fused import attention
from nybble.models.fused.attention import AttentionRule, Layout
from nybble.models.fused.block_mask import causal_block_mask
from tests.models.test_packing import packed, samples


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("samples_a_row", [1, 4])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_flexible_way(
    samples_a_row: int, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention)
    _, _, position_ids = packed(samples())
    layout = Layout.of(position_ids, samples_a_row=samples_a_row)
    q, k, v = (torch.randn(position_ids.numel(), heads, 16) for heads in (4, 2, 2))
    rule = AttentionRule(0.3, window, softcap)
    found = attention._flexible(q, k, v, rule, layout)
    torch.testing.assert_close(found, attention._masked(q, k, v, rule, layout))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_layers_of_one_window_share_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention)
    layout = Layout(2, 16)
    q = torch.randn(32, 2, 16)
    for window in (None, 4, None, 4):
        attention._flexible(q, q, q, AttentionRule(0.3, window), layout)
    assert set(layout.block_masks) == {None, 4}
    before = dict(layout.block_masks)
    attention._flexible(q, q, q, AttentionRule(0.3, 4), layout)
    assert layout.block_masks[4] is before[4]


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@pytest.mark.parametrize("seq_len", [100, 128, 1000, 1024])
@pytest.mark.parametrize("window", [None, 1, 100, 300, 5000])
@pytest.mark.parametrize("packed_rows", [False, True])
def test_block_masks(seq_len: int, window: int | None, packed_rows: bool) -> None:
    """As PyTorch makes them, block by block, from the mask of all pairs."""
    starts = torch.rand(3, seq_len, generator=torch.Generator().manual_seed(seq_len)) < 0.004
    numbers = starts.int().cumsum(1) if packed_rows else None
    found = causal_block_mask(seq_len, window=window, samples=numbers, device=torch.device("cpu"))
    batch = None if numbers is None else 3
    expected = create_block_mask(found.mask_mod, batch, None, seq_len, seq_len, device="cpu")
    assert found.seq_lengths == expected.seq_lengths
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, others = (getattr(mask, f"{name}_num_blocks") for mask in (found, expected))
        assert torch.equal(counts, others)
        listed, wanted = (getattr(mask, f"{name}_indices") for mask in (found, expected))
        used = torch.arange(listed.shape[-1]) < counts[..., None]
        assert torch.equal(listed[used], wanted[used])
