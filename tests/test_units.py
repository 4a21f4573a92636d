"""Amounts as people write them."""

from __future__ import annotations

import pytest

from nybble.units import format_bytes, format_count, format_seconds, parse_bytes, plural


def test_what_is_shown() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 3 * 2**30)] == ["0 B", "1023 B", "1.50 KiB", "3.00 GiB"]
    assert [format_count(n) for n in (7, 4_884_480, 8e9)] == ["7", "4.88 M", "8.00 B"]
    assert [format_seconds(s) for s in (0.04, 12.34, 75.2, 3661)] == ["0.0 s", "12.3 s", "1:15", "1:01:01"]
    assert [plural(n, "row") for n in (0, 1, 2000)] == ["0 rows", "1 row", "2,000 rows"]


def test_amounts_of_memory_as_people_write_them() -> None:
    assert [parse_bytes(text) for text in ("24GiB", "24 GB", "24g", "1.5MiB")] == [24 * 2**30] * 3 + [3 * 2**19]
    for text in ("24", "GiB", "1.2.3GiB", "24 gigabytes", "-1GiB", ""):
        with pytest.raises(ValueError, match="write it like 24GiB"):
            parse_bytes(text)
