"""How much memory the host has left for this process."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_GROUPS = Path("/sys/fs/cgroup")  # in a container, those that this process is in
# Limit, what is held, and which line of memory.stat has what is held of files and given up when others need it.
_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def available_host_bytes() -> int:
    """What this process can still take without swapping, within the limit of its control group."""
    return max(0, min([_left_of_machine(), *_left_of_groups(_GROUPS)]))


def total_host_bytes() -> int:
    """What this process could hold if it were alone, within the limit of its control group."""
    limits = [_read(_GROUPS / limit) for limit, *_ in _FILES]
    return min([_bytes_of_machine(), *(int(limit) for limit in limits if limit.isdigit())])


def _left_of_machine() -> int:
    found = re.search(r"MemAvailable:\s*(\d+) kB", _MEMINFO.read_text()) if _MEMINFO.exists() else None
    if found:
        return int(found[1]) * 1024
    return _bytes_of_machine()


def _bytes_of_machine() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _left_of_groups(folder: Path) -> Iterator[int]:
    for limit, held, statistics, line in _FILES:
        texts = [_read(folder / file) for file in (limit, held)]
        if all(text.isdigit() for text in texts):  # `max` is no limit
            cached = re.search(rf"^{line} (\d+)$", _read(folder / statistics), re.MULTILINE)
            yield int(texts[0]) - int(texts[1]) + (int(cached[1]) if cached else 0)


def _read(file: Path) -> str:
    return file.read_text().strip() if file.exists() else ""
