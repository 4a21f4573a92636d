"""Amounts as people write them."""

from __future__ import annotations

from nybble.units import format_bytes, format_count, format_seconds


def test_what_is_shown() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 3 * 2**30)] == ["0 B", "1023 B", "1.50 KiB", "3.00 GiB"]
    assert [format_count(n) for n in (7, 4_884_480, 8e9)] == ["7", "4.88 M", "8.00 B"]
    assert [format_seconds(s) for s in (0.04, 12.34, 75.2, 3661)] == ["0.0 s", "12.3 s", "1:15", "1:01:01"]
