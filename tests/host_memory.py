"""How much host memory a piece of code takes at most, as Linux and glibc count and give it back."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="memory is read and controlled as Linux and glibc do"
)

_MAPPED_FROM = 2**14  # bytes of an allocation that gets, and gives back, pages of its own
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class HostPeak:
    """peak_bytes: how far the resident memory of the process rose at most above where it began."""

    peak_bytes: int = 0


@contextlib.contextmanager
def host_peak() -> Iterator[HostPeak]:
    """Measure what is inside. Freed tensors of more than 16 KiB are given back at once: resident memory is live."""
    mmap_threshold, libc = -3, ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, _MAPPED_FROM)
    measured = HostPeak()
    gc.collect()
    libc.malloc_trim(0)  # or what was freed before would be taken again, unseen
    holes = _fill_holes(libc)
    before = _memory("VmRSS")
    _CLEAR_REFS.write_text("5")  # the peak counts from here
    try:
        yield measured
        measured.peak_bytes = _memory("VmHWM") - before
    finally:
        for block in holes:
            libc.free(block)
        libc.mallopt(mmap_threshold, 2**25)


def _fill_holes(libc: ctypes.CDLL) -> list[ctypes.c_void_p]:
    """Blocks, never touched, that take all room within the heap: a tensor put there would not be given back."""
    libc.malloc.restype, blocks, mapped = ctypes.c_void_p, [], False
    while not mapped:
        address = libc.malloc(_MAPPED_FROM)
        mapped = bool(ctypes.c_size_t.from_address(address - 8).value & 2)  # glibc's flag in front of each block
        blocks.append(ctypes.c_void_p(address))
    return blocks


def _memory(field: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
