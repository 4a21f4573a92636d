"""Budgets of device memory, with a device made of numbers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from nybble.errors import UserError
from nybble.memory.budget import (
    Peak,
    cap_allocator,
    peak,
    peak_allocated_bytes,
    reset_peak,
    take_peak,
    unreserved_bytes,
)

DEVICE = torch.device("cuda", 0)
GIB, MIB = 2**30, 2**20


class Card:
    """80 GiB, of which 3 are in use, 2 of those by the allocator, which has held 5. fraction: what it was capped at."""

    fraction: float | None = None

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        figures = {
            "mem_get_info": (77 * GIB, 80 * GIB),
            "memory_reserved": 2 * GIB,
            "max_memory_reserved": 5 * GIB,
            "max_memory_allocated": 4 * GIB,
        }
        for name, figure in figures.items():
            monkeypatch.setattr(f"torch.cuda.{name}", lambda _, figure=figure: figure)
        monkeypatch.setattr("nybble.memory.budget._taken", {})
        monkeypatch.setattr("nybble.memory.budget._load_libraries", lambda _: None)
        monkeypatch.setattr("torch.cuda.current_device", lambda: DEVICE.index)
        monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", self._cap)

    def _cap(self, fraction: float, index: object) -> None:
        assert index == DEVICE.index  # PyTorch takes no device without one here
        self.fraction = fraction


def test_the_peak_counts_what_is_beyond_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    Card(monkeypatch)
    assert peak(DEVICE) == Peak(4 * GIB, 5 * GIB, 1 * GIB)
    assert peak(DEVICE).total_bytes == 6 * GIB
    assert peak(torch.device("cpu")).total_bytes == 0


def test_the_peak_goes_on_over_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    Card(monkeypatch)
    counted = {"allocated": 4 * GIB, "reserved": 5 * GIB}
    for name in counted:
        monkeypatch.setattr(f"torch.cuda.max_memory_{name}", lambda _, name=name: counted[name])
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda _: counted.update(allocated=GIB, reserved=2 * GIB))
    assert take_peak(DEVICE) == (4 * GIB, 5 * GIB)
    assert take_peak(DEVICE) == (GIB, 2 * GIB)
    anywhere = torch.device("cuda")
    assert peak(anywhere) == Peak(4 * GIB, 5 * GIB, GIB)
    counted["allocated"] = 6 * GIB
    assert peak_allocated_bytes(DEVICE) == 6 * GIB
    reset_peak(anywhere)
    assert peak(DEVICE) == Peak(GIB, 2 * GIB, GIB)
    reset_peak(torch.device("cpu"))


@pytest.mark.parametrize(("budget", "expected", "allowed"), [(20, 0, 19), (20, 2, 18), (100, 0, 79)])
def test_what_is_beyond_the_allocator_is_taken_off(
    monkeypatch: pytest.MonkeyPatch, budget: int, expected: int, allowed: int
) -> None:
    card = Card(monkeypatch)
    cap = allowed * GIB - 20 * MIB  # a last page that was not asked for stays within the budget
    assert cap_allocator(budget * GIB, DEVICE, expected_beyond_bytes=expected * GIB) == cap
    assert card.fraction == cap / (80 * GIB)


def test_the_current_device_needs_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch)
    assert cap_allocator(20 * GIB, torch.device("cuda")) == cap_allocator(20 * GIB, DEVICE)

    def fraction(index: object) -> float | None:
        assert index == DEVICE.index
        return card.fraction

    monkeypatch.setattr("torch.cuda.get_per_process_memory_fraction", fraction)
    assert unreserved_bytes(torch.device("cuda")) == pytest.approx(17 * GIB, abs=20 * MIB + 1)


def test_a_budget_must_leave_something(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch)
    with pytest.raises(UserError, match=r"1\.00 GiB of device memory leave nothing beside the 1\.00 GiB"):
        cap_allocator(GIB, DEVICE)
    with pytest.raises(UserError, match="leave nothing"):
        cap_allocator(GIB + 20 * MIB, DEVICE)
    assert card.fraction is None


def test_a_cpu_is_not_capped() -> None:
    assert cap_allocator(GIB, torch.device("cpu")) == GIB


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", "expandable_segments:True"),
        ("max_split_size_mb:64", "max_split_size_mb:64,expandable_segments:True"),
        ("expandable_segments:False", "expandable_segments:False"),
    ],
)
def test_settings_of_the_allocator_that_were_there_stay(given: str, expected: str) -> None:
    """In a process of its own, whose allocator nobody else uses."""
    code = (
        "import torch; from nybble.memory.budget import expand_segments; expand_segments(); expand_segments();"
        "print(torch._C._accelerator_getAllocatorSettings())"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTORCH_ALLOC_CONF": given},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == expected
