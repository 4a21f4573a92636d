"""Launch parameters follow from a card's limits."""

from __future__ import annotations

import pytest
import torch

from nybble.ops.triton.launch import CARDS, Card, card_of, elementwise_tile


@pytest.mark.parametrize("card", CARDS, ids=str)
@pytest.mark.parametrize("bytes_per_value", [2, 4])
def test_programs_that_fill_a_multiprocessor_share_its_memory(card: Card, bytes_per_value: int) -> None:
    tile = elementwise_tile(card, bytes_per_value=bytes_per_value, multiple_of=64)
    programs = card.max_threads // (32 * tile.num_warps)
    assert programs * tile.values * bytes_per_value <= card.shared_bytes
    assert tile.values & (tile.values - 1) == 0


def test_a_small_card_gets_a_smaller_tile() -> None:
    small = Card((7, 5), max_threads=1024, shared_bytes=16 << 10)
    assert elementwise_tile(small, bytes_per_value=4, multiple_of=64).values == 1024
    assert elementwise_tile(small, bytes_per_value=4, multiple_of=4096).values == 4096, "a tile holds whole blocks"


@pytest.mark.gpu
def test_the_card_at_hand_is_read_from_its_properties() -> None:
    card = card_of(torch.device("cuda", 0))
    assert card.capability == torch.cuda.get_device_capability(0)
    known = {known.capability: known for known in CARDS}
    assert card == known.get(card.capability, card)
