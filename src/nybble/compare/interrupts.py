"""Ctrl-C while another process works: that one gets it too, and this one waits until it has ended."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Self


class NotedInterrupts:
    """Within a `with`, Ctrl-C is noted where Python would raise it. Outside the main thread it does nothing.

    A pool of processes must not be left by one: raised as the pool is shut down (a second Ctrl-C, or the second signal
    of `timeout -s INT`), it makes Thread.join of Python 3.11 take the pool's own thread for one that has ended. At exit
    Python then closes the pool's queue before that thread has told the process to end by it, and all wait for ever.
    """

    def __init__(self) -> None:
        self.came = False
        self._replaced = False

    def note(self, _number: int = signal.SIGINT, _frame: FrameType | None = None) -> None:
        self.came = True

    def __enter__(self) -> Self:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self.note)
            self._replaced = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._replaced:
            signal.signal(signal.SIGINT, signal.default_int_handler)
