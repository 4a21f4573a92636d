"""The most host memory that a piece of work takes: anonymous and pinned, looked at a thousand times a second.

Files that are mapped, or in the page cache, do not count: the system takes their memory back when it needs it.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_SECONDS_BETWEEN = 0.001


@dataclass
class HostPeak:
    """peak_bytes: above what the process held when measuring began."""

    peak_bytes: int = 0


@contextlib.contextmanager
def host_peak() -> Iterator[HostPeak]:
    measured, over = HostPeak(), threading.Event()
    before = held_bytes()

    def watch() -> None:
        while not over.wait(_SECONDS_BETWEEN):
            measured.peak_bytes = max(measured.peak_bytes, held_bytes() - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield measured
    finally:
        over.set()
        watcher.join()
        measured.peak_bytes = max(measured.peak_bytes, held_bytes() - before)


def held_bytes() -> int:
    """Anonymous and shared memory of this process, and what PyTorch's allocator of pinned memory holds."""
    text = _STATUS.read_text()
    resident = sum(1024 * int(value) for value in re.findall(r"(?:RssAnon|RssShmem):\s*(\d+) kB", text))
    pinned = torch.cuda.host_memory_stats() if torch.cuda.is_initialized() else {}
    return resident + int(pinned.get("allocated_bytes.current", 0))
