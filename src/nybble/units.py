"""Bytes, counts and times as people write them. Code holds plain numbers; these are used at the edge."""

from __future__ import annotations

import re

_BINARY = ["B", "KiB", "MiB", "GiB", "TiB"]


def format_bytes(num_bytes: float) -> str:
    """`1536` -> `1.50 KiB`."""
    value = float(num_bytes)
    for unit in _BINARY[:-1]:
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} {_BINARY[-1]}"


def parse_bytes(text: str) -> int:
    """`24GiB`, `24 GB`, `24G` -> bytes: as people call memory, all of them are 24 x 2^30. Raises ValueError."""
    found = re.fullmatch(r"([\d.]+)\s*([KMGT])(i?B)?", text.strip(), re.IGNORECASE)
    if found is None or found[1].count(".") > 1 or found[1] == ".":
        raise ValueError(f"{text!r} is no amount of memory; write it like 24GiB or 800MiB")
    return int(float(found[1]) * 1024 ** (1 + "KMGT".index(found[2].upper())))


def format_count(count: float) -> str:
    """`4884480` -> `4.88 M`."""
    for factor, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if abs(count) >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f}"


def format_seconds(seconds: float) -> str:
    """`75.2` -> `1:15`; below a minute `12.3 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def plural(count: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
