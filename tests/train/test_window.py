"""Windows: the tensors that went in come out, on any device, and each where a kernel can read it in one piece."""

from __future__ import annotations

import torch

from nybble.train.window import Window, windows
from tests.train.toy import batch


def test_what_is_packed_comes_out() -> None:
    batches = [batch((2, 7), 1), batch((1, 40), 2), batch((3, 32), 3)]
    packed = Window.pack(batches, pinned=False).to(torch.device("cpu"))
    assert packed.shapes == ((2, 7), (1, 40), (3, 32))
    assert packed.counts.tolist() == [sum(b.target_tokens for b in batches), 14 + 40 + 96]
    for parts, taken in zip(packed.inputs, batches, strict=True):
        for part, value in zip(parts, (taken.input_ids, taken.labels, taken.position_ids), strict=True):
            assert torch.equal(part, value)
            assert part.is_contiguous()
            assert part.storage_offset() % 32 == 0


def test_a_window_takes_over_the_values_of_another() -> None:
    ours, other = (Window.pack([batch((2, 5), seed), batch((2, 6), seed)], pinned=False) for seed in (1, 2))
    where = ours.inputs[1][1].data_ptr()
    ours.copy_(other)
    assert ours.counts.tolist() == other.counts.tolist()
    assert torch.equal(ours.inputs[1][1], other.inputs[1][1])
    assert ours.inputs[1][1].data_ptr() == where


def test_the_last_window_may_be_short() -> None:
    taken = list(windows((batch((1, 4), seed) for seed in range(5)), 2, pinned=False))
    assert [len(each.shapes) for each in taken] == [2, 2, 1]
