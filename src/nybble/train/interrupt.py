"""Ctrl-C and SIGTERM: the step in progress is finished and saved first, a second signal ends the run at once."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch

from nybble.train.processes import sum_over_ranks, world_size


class TrainingInterrupted(KeyboardInterrupt):
    """The run was stopped by a signal after its step was done. checkpoint: where it goes on with `--resume`."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        self.step = step
        self.checkpoint = checkpoint
        settings = checkpoint.parents[1] / "config.yaml"
        super().__init__(f"stopped after step {step}; go on with `nybble train {settings} --resume`")


class StopSignals:
    """Within a `with`, remembers that a signal came instead of dying of it. Outside the main thread it does nothing."""

    def __init__(self) -> None:
        self._came = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def came(self, device: torch.device) -> bool:
        """Whether any process was told to stop; all of them must ask, and all get the same answer."""
        if world_size() == 1:
            return self._came
        return bool(sum_over_ranks(torch.tensor(float(self._came), device=device)).item())

    def _remember(self, _number: int, _frame: FrameType | None) -> None:
        self._came = True
        self._restore()
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nfinishing this step, then saving a checkpoint; again to stop at once\n")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
