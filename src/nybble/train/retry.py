"""Out of memory in the middle of a run: what can be given up is given up, and the work is done again."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from nybble.errors import TrainingStopped
from nybble.memory.budget import available_bytes
from nybble.memory.lack import is_out_of_memory
from nybble.optim.flat import FlatAdamW
from nybble.train.graph import GraphStep
from nybble.train.out_of_memory import describe
from nybble.train.step import EagerStep, Figures
from nybble.train.window import Shapes, Window

T = TypeVar("T")


@dataclass(frozen=True)
class _Failure:
    where: str
    what: str


class RetryingStep:
    """Does steps; one that runs out of memory is done again, holding less, with the same gradient.

    Given up are, in this order: the memory of CUDA graphs; the device's memory for paged moments; activations of this
    step, if the loss module has a context `leaner()` for that. A window that has micro-batches as long as one that
    needed it gives up moments or activations beforehand; moments return with the first window that leaves them room.
    A step that has begun to update is past running out of memory. Where nothing is left to give up (on several
    processes nothing ever is), `launch` raises TrainingStopped.

    window_bytes: what a window of some shapes will need beside all that is held between steps, if that is known:
    moments leave before it lacks.
    suggest: what to do about a step that does not fit at all.
    """

    def __init__(
        self,
        eager: EagerStep,
        graphs: GraphStep | None = None,
        *,
        window_bytes: Callable[[Shapes], int] | None = None,
        suggest: Callable[[], str],
    ) -> None:
        self.eager = eager
        self.graphs = graphs
        self.window_bytes = window_bytes
        self.suggest = suggest
        self.optimizer = eager.optimizer if isinstance(eager.optimizer, FlatAdamW) else None
        self.leaner: Callable[[], contextlib.AbstractContextManager[None]] | None = None
        if self.optimizer is not None:
            self.leaner = getattr(eager.loss_module, "leaner", None)
        # Tokens of the shortest micro-batch that needed it.
        self._evict_from = self._lean_from = math.inf

    def launch(self, window: Window, seed: int) -> str | None:
        tokens = max(shape.numel() for shape in window.shapes)
        self._place_moments(window, tokens)
        lean = tokens >= self._lean_from
        note, failure = self._attempt(window, seed, lean=lean)
        notes = [note]
        while failure is not None:
            self._clean_up()
            how = self._give_up(tokens)
            if how is None and self.leaner is not None and not lean:
                how, lean = "with fewer activations kept", True
                self._lean_from = min(self._lean_from, tokens)
            if how is None:
                what = "\n".join([failure.what, *(note for note in notes if note)])
                raise TrainingStopped(what, where=failure.where, fix=self.suggest())
            notes.append(f"note: {failure.where}: {failure.what}; the step was done again {how}")
            _, failure = self._attempt(window, seed, lean=lean, again=True)
        return "\n".join(note for note in notes if note) or None

    def read(self) -> Figures:
        return (self.graphs or self.eager).read()

    def finish(self) -> None:
        (self.graphs or self.eager).finish()

    def beside(self, what: str, function: Callable[[], T]) -> T:
        """Do something between two steps, again if need be with the memory that graphs and moments hold."""
        while True:
            try:
                return function()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = describe(error, self.eager.device)
            self._clean_up()
            if self._give_up() is None:
                raise TrainingStopped(failure, where=what, fix=self.suggest())

    def _place_moments(self, window: Window, tokens: int) -> None:
        """Have paged moments on the device unless the window needs their memory."""
        if self.optimizer is None or not self.optimizer.paged or (self.graphs and self.graphs.has_graph(window)):
            return
        needed = self.window_bytes(window.shapes) if self.window_bytes else 0
        if tokens >= self._evict_from or available_bytes(self.eager.device) < needed:
            self.optimizer.evict()
        else:
            self.optimizer.restore_if_room(needed)

    def _attempt(
        self, window: Window, seed: int, *, lean: bool, again: bool = False
    ) -> tuple[str | None, _Failure | None]:
        """What there is to say about the step, and why it failed; a step in a way of its own is no graph."""
        note = None
        try:
            if lean or again:
                with self.leaner() if lean and self.leaner else contextlib.nullcontext():
                    self._launch_eagerly(window, seed)
            else:
                note = (self.graphs or self.eager).launch(window, seed)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # Nothing of the exception may live on: it holds the tensors of the step that failed.
            note = "\n".join(getattr(error, "__notes__", []))
            return note, _Failure(self.eager.phase, describe(error, self.eager.device))
        return note, None

    def _launch_eagerly(self, window: Window, seed: int) -> None:
        if self.graphs is not None:
            self.graphs.launch_eagerly(window, seed)
        else:
            self.eager.launch(window, seed)

    def _give_up(self, tokens: int | None = None) -> str | None:
        """Give up something that a step can do without; how it is done then. None if nothing is left."""
        if self.graphs is not None and self.graphs.release():
            return "without CUDA graphs" + (f", as are {self.graphs.pause}" if self.graphs.pause else "")
        if self.optimizer is not None and self.optimizer.evict():
            if tokens is not None:
                self._evict_from = min(self._evict_from, tokens)
            return "with the optimizer's moments in host memory"
        return None

    def _clean_up(self) -> None:
        """Leave nothing of what failed, on the device's streams, in the gradients or in its memory."""
        if self.eager.device.type == "cuda":
            torch.cuda.synchronize(self.eager.device)
        self.eager.optimizer.zero_grad()
        gc.collect()  # nodes of autograd in cycles hold tensors
        if self.eager.device.type == "cuda":
            torch.cuda.empty_cache()
