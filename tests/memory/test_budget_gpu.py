"""A budget holds on a card: what goes beyond it is out of memory, what stays within is not."""

from __future__ import annotations

import pytest
import torch

from nybble.memory.budget import beyond_bytes, cap_allocator, peak

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("own_allocator")]

DEVICE = torch.device("cuda", 0)
MIB = 2**20


def test_all_together_stays_within_the_budget() -> None:
    cap_allocator(beyond_bytes(DEVICE) + 2**40, DEVICE)  # loads what it counts
    budget = beyond_bytes(DEVICE) + torch.cuda.memory_reserved(DEVICE) + 512 * MIB
    left = cap_allocator(budget, DEVICE) - torch.cuda.memory_reserved(DEVICE)
    assert 480 * MIB < left <= 512 * MIB  # a page may be taken beyond what is asked for
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(left + 4 * MIB, dtype=torch.uint8, device=DEVICE)
    within = torch.empty(left - 4 * MIB, dtype=torch.uint8, device=DEVICE)
    assert peak(DEVICE).total_bytes <= budget
    assert peak(DEVICE).allocated_bytes >= within.numel()
