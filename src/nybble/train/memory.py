"""Peaks of memory, as the device and the operating system count them."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch

from nybble.memory.budget import peak_allocated_bytes
from nybble.memory.budget import reset_peak as reset_peak

_STATUS = Path("/proc/self/status")


def peak_host_bytes() -> int:
    """Largest resident set of this process so far."""
    # Not getrusage where the kernel says it itself: there, a process begins with the peak of the one that started it.
    if match := re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text() if _STATUS.exists() else ""):
        return int(match[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def peak_device_bytes(device: torch.device) -> int:
    """Most bytes that tensors held on `device` since `reset_peak`; on a CPU, the process's peak."""
    return peak_allocated_bytes(device) if device.type == "cuda" else peak_host_bytes()
