"""Peaks of memory by phase, and energy, of runs that follow one another in one process."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from nybble.compare.result import PhaseMemory
from nybble.train.memory import peak_device_bytes, peak_host_bytes, reset_peak

_CLEAR = Path("/proc/self/clear_refs")


class Meter:
    """The latest peaks of each phase: load, train, evaluate."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.phases: dict[str, PhaseMemory] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within, peaks are this phase's; one that is within another ends it."""
        self.begin()
        try:
            yield
        finally:
            self.end(name)

    def begin(self) -> None:
        reset_peak(self.device)
        reset_host_peak()

    def end(self, name: str) -> None:
        """What was held at most since peaks were last set back; set back for what follows."""
        on_device = peak_device_bytes(self.device) if self.device.type == "cuda" else None
        self.phases[name] = PhaseMemory(name, peak_host_bytes(), on_device)
        self.begin()


def reset_host_peak() -> None:
    """Have the kernel count this process's peak anew; where it cannot, the peak stays that of the whole process."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")  # see proc(5)


class EnergyMeter:
    """Joules that the device has used, all that runs on it counted, as NVIDIA's management library reports them."""

    def __init__(self, device: torch.device) -> None:
        self._read = _counter(device)
        self._start: tuple[float, float] | None = None

    def reset(self) -> None:
        """Forget a start whose run failed: its energy is not that of the next one."""
        self._start = None

    def start(self) -> None:
        """Of a run that goes on from a checkpoint it is not to be called: what was used before is not known."""
        self._start = (self._read(), time.perf_counter()) if self._read else None

    def stop(self) -> tuple[float | None, float | None]:
        """Joules and seconds since `start`; None without one, and where the device does not report them."""
        if self._start is None or self._read is None:
            return None, None
        (joules, since), self._start = self._start, None
        return self._read() - joules, time.perf_counter() - since


def _counter(device: torch.device) -> Callable[[], float] | None:
    """Reads the joules used since the driver was loaded; None without a GPU of Volta or later, or nvidia-ml-py."""
    if device.type != "cuda":
        return None
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError:
        return None
    return lambda: float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000  # it counts millijoules
