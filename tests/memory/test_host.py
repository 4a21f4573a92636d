"""What the host has left, by the kernel's own files."""

from __future__ import annotations

from pathlib import Path

import pytest

from nybble.memory import host


def test_a_control_group_limits_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_GROUPS", tmp_path)
    unlimited = host.available_host_bytes()
    assert unlimited > 0
    for name, value in {"max": "3000", "current": "2500", "stat": "active_file 9\ninactive_file 100\n"}.items():
        (tmp_path / f"memory.{name}").write_text(value)
    assert host.available_host_bytes() == 600
    assert host.total_host_bytes() == 3000
    (tmp_path / "memory.max").write_text("max\n")
    assert host.total_host_bytes() >= host.available_host_bytes() > 3000


def test_so_does_one_of_the_older_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_GROUPS", tmp_path)
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text("1000\n")
    (tmp_path / "memory/memory.usage_in_bytes").write_text("1200\n")
    assert host.available_host_bytes() == 0
    assert host.total_host_bytes() == 1000
    (tmp_path / "memory/memory.stat").write_text("cache 700\ntotal_inactive_file 500\n")
    assert host.available_host_bytes() == 300
