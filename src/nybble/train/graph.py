"""Steps as CUDA graphs: what one step launches is recorded once, and from then on launched as a whole by one call.

A step of an 8B model launches thousands of kernels at 5 to 10 us of Python each: more time than the GPU needs for 2k
tokens. A graph repeats the very kernels at the very addresses, so batches are copied to where the recorded one lay.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.memory.budget import unreserved_bytes
from nybble.memory.lack import is_out_of_memory
from nybble.optim.flat import FlatAdamW
from nybble.train.step import EagerStep, Figures
from nybble.train.window import Shapes, Window
from nybble.units import format_bytes

_WARM_UP = 2  # windows of a shape before it is recorded: kernels get compiled, libraries get their workspaces
_MOST_GRAPHS = 2  # shapes; more of them would hold ever more memory
_DIFFERENT_AT_FIRST = 4  # windows that all differ in shape: a graph would hardly ever be used
# What the pool of a graph may take beside what a step does: with 708 MiB left, a recording of a step of 626 ran out.
_BESIDE_BYTES = 128 * 2**20
_WORTHWHILE = 20  # steps by graphs between two times that their memory is needed: recording takes one or two
_PATIENCE = 16  # windows without graphs where fewer were possible, and each further time twice as many


class NotRecorded(Exception):
    """A step could not be recorded, or should not be. Nothing of it was computed."""


class GraphStep:
    """Runs the third and later windows of a shape as a graph and all others as `eager` does, with the same bits.

    For one process, FlatAdamW and a loss module that waits for the device nowhere. Where it does after all, where there
    is no room for a graph, or where recording fails, the rest of the run is eager, and `launch` says so. Paged moments
    leave for the first graph and stay away as long as there is one. Graphs end when moments move or their memory is
    needed; they are made anew, after a while if they were of little use.
    """

    def __init__(self, eager: EagerStep, recorder: Recorder) -> None:
        self.eager = eager
        self.recorder = recorder
        self.given_up = False
        self._seen: Counter[Shapes] = Counter()
        self._rehearsed: dict[Shapes, int] = {}  # what a step takes of the device's memory
        self._recorded: dict[Shapes, _Recorded] = {}
        self._too_large: set[Shapes] = set()  # for the room beside the graphs that there are
        self._replays = 0  # since there were no graphs
        self._patience = 0  # windows that the last pause took
        self._pause = 0  # windows until a graph may be made
        self._moves = self._optimizer.moves  # when the first graph was recorded

    def launch(self, window: Window, seed: int) -> str | None:
        moved = self._follow_moments()
        with self.recorder.on_stream():
            self.eager.settle()
            note = moved or (None if self.given_up else self._prepare(window))
            if recorded := self._recorded.get(window.shapes):
                torch.manual_seed(seed)  # handed to the graph when it is launched
                recorded.window.copy_(window)
                recorded.replay()
                self._replays += 1
                self.eager.figures = recorded.figures
                return note
            try:
                return self._rehearse(window, seed) or note
            except (RuntimeError, MemoryError) as error:
                if note:
                    error.add_note(note)
                raise

    def launch_eagerly(self, window: Window, seed: int) -> None:
        """As `eager` does, on the stream where all of the run's memory is."""
        with self.recorder.on_stream():
            self.eager.launch(window, seed)

    def has_graph(self, window: Window) -> bool:
        return window.shapes in self._recorded

    def release(self) -> bool:
        """Give back the memory of all graphs; whether there were any. After little use, the next come after a pause."""
        if not self._recorded:
            return False
        self._patience = max(_PATIENCE, 2 * self._patience) if self._replays < _WORTHWHILE else 0
        self._pause = self._patience
        self._forget()
        return True

    @property
    def pause(self) -> str:
        """Which steps are without graphs too, in words; empty if none has to be."""
        return f"the next {self._pause}" if self._pause else ""

    def read(self) -> Figures:
        with self.recorder.on_stream():
            return self.eager.read()

    def finish(self) -> None:
        self.eager.finish()

    def _follow_moments(self) -> str | None:
        """Forget graphs that know other addresses of the moments; a note if there will be none for a while."""
        if self._moves == self._optimizer.moves:
            return None
        self._moves = self._optimizer.moves
        if not (self.release() and self._pause):
            return None
        return f"note: the optimizer's moments moved, so this step is not run as a CUDA graph, nor are {self.pause}"

    def _prepare(self, window: Window) -> str | None:
        """Count the window, and record a step of its shape if it is time; a note if there will be no more graphs."""
        self._seen[window.shapes] += 1
        if self._pause:
            self._pause -= 1
            return None
        if len(self._seen) == self._seen.total() == _DIFFERENT_AT_FIRST:
            return self._give_up(f"the first {_DIFFERENT_AT_FIRST} all differ in shape (data.packing makes them alike)")
        if not self._is_due(window.shapes):
            return None
        lacking, note = self._lacking(window.shapes), None
        if lacking > 0 and self._recorded:
            self._too_large.add(window.shapes)
            return None
        if lacking > 0 and self._optimizer.evict():
            self._moves = self._optimizer.moves
            lacking = self._lacking(window.shapes)
            note = (
                "note: the optimizer's moments stay in host memory: beside a step as a CUDA graph is no room for them"
            )
        if lacking > 0:
            return self._give_up(f"one would need {format_bytes(lacking)} more of the device's memory")
        try:
            self._recorded[window.shapes] = self._record(window)
        except NotRecorded as error:
            reason = str(error)
        else:
            return note
        return self._give_up(reason)

    def _is_due(self, shapes: Shapes) -> bool:
        """Whether it is time to record a step of these shapes."""
        if len(self._recorded) == _MOST_GRAPHS or shapes in self._recorded or shapes in self._too_large:
            return False
        return self._seen[shapes] > _WARM_UP and shapes in self._rehearsed

    def _lacking(self, shapes: Shapes) -> int:
        """Bytes of the device's memory; a recording that runs out of it ends graphs for the run.

        All graphs use the same pool, which holds what the largest takes.
        """
        held = max((self._rehearsed[other] for other in self._recorded), default=0)
        return self._rehearsed[shapes] - held - self.recorder.room()

    def _record(self, window: Window) -> _Recorded:
        inputs = Window(window.shapes, torch.empty_like(window.packed, device=self.eager.device))
        figures = torch.empty(4, dtype=torch.float64, device=self.eager.device)

        def step() -> None:
            figures.copy_(self.eager.enqueue(inputs))

        return _Recorded(inputs, figures, self.recorder.record(step))

    def _rehearse(self, window: Window, seed: int) -> str | None:
        """As `eager` does, once with no waiting allowed; a step that waits is done again, and no graphs are made."""
        last_before = self._seen[window.shapes] >= _WARM_UP and window.shapes not in self._rehearsed
        if self.given_up or not last_before:
            return self.eager.launch(window, seed)
        try:
            with self.recorder.growth() as growth, self.recorder.no_waiting():
                self.eager.launch(window, seed)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            reason = _first_line(error)
        else:
            self._rehearsed[window.shapes] = growth() + _BESIDE_BYTES
            return None
        # Here, because as long as the exception lives, so do the tensors of the step that failed.
        note = self._give_up(reason)
        self.eager.optimizer.zero_grad()
        self.eager.launch(window, seed)
        return note

    def _give_up(self, reason: str) -> str:
        self.given_up = True
        self._forget()
        return f"note: steps are not run as CUDA graphs: {reason}"

    def _forget(self) -> None:
        self._recorded.clear()
        self._too_large.clear()
        self._replays = 0
        self.recorder.forget()

    @property
    def _optimizer(self) -> FlatAdamW:
        assert isinstance(self.eager.optimizer, FlatAdamW)
        return self.eager.optimizer


@dataclass(frozen=True)
class _Recorded:
    """A step as a graph, and the tensors that it reads and writes."""

    window: Window
    figures: Tensor
    replay: Callable[[], None]


class Recorder:
    """Makes CUDA graphs. All that is recorded, and all that goes before, runs on one stream of its own.

    On that stream autograd must have made its nodes, or a recording would wait for a stream outside it. All graphs
    share one pool of memory: they never run at the same time, and none finds there what another has left.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []
        # cuBLAS keeps 32 MiB a thread and stream on Hopper, and loading and pre-flight were on another stream. So was
        # what the allocator keeps from then: 6 GiB of 8B in 16 bits, whose matrices were stacked.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """Launch what is inside on the stream, after all that was launched before."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield

    @contextlib.contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Whatever waits for the device inside raises RuntimeError.

        A recording cannot wait and breaks off, which PyTorch does not survive unharmed (see `_mend`): this finds out
        beforehand, at the cost of a step that is done again.
        """
        before = torch.cuda.get_sync_debug_mode()
        _set_sync_debug_mode(2)
        try:
            yield
        finally:
            _set_sync_debug_mode(before)

    @contextlib.contextmanager
    def growth(self) -> Iterator[Callable[[], int]]:
        """A function to be called behind it: how many bytes the allocator took for what was launched within.

        It keeps them, unless it runs out. A recording, which has a pool of its own, takes as much.
        """
        self._give_back()
        before = torch.cuda.memory_reserved(self.device)
        yield lambda: torch.cuda.memory_reserved(self.device) - before

    def room(self) -> int:
        """Bytes of the device that a recording can take."""
        self._give_back()
        return unreserved_bytes(self.device)

    def _give_back(self) -> None:
        """Have the allocator give back all that nothing uses."""
        gc.collect()  # cycles may hold memory of the steps before
        torch.cuda.empty_cache()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record what `function` launches on the stream, none of which runs; returns what does launch it.

        Raises NotRecorded if that fails.
        """
        graph = torch.cuda.CUDAGraph()
        self._graphs.append(graph)
        failure = None
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                try:
                    function()
                except Exception as error:
                    failure = _first_line(error)
        except RuntimeError as error:  # what was launched cannot be recorded
            failure = failure or _first_line(error)
            self._mend()
        if failure is not None:
            raise NotRecorded(failure)
        return graph.replay

    def forget(self) -> None:
        """Give up all graphs and their memory; others can be made."""
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle()  # what is left in the old one must not be given away twice
        self._give_back()

    def _mend(self) -> None:
        """Undo what a recording that CUDA broke off leaves behind."""
        # Until pytorch/pytorch#180395 the allocator believes that it goes on, fails when its cache is emptied and keeps
        # what was recorded into; the generator of random numbers believes so too.
        with contextlib.suppress(RuntimeError):  # "not currently recording": PyTorch has done it
            torch._C._cuda_endAllocateToPool(self._stream.device_index, self._pool)
            torch._C._cuda_releasePool(self._stream.device_index, self._pool)
        generator = torch.cuda.default_generators[self._stream.device_index]
        generator.graphsafe_set_state(torch.Generator(self.device))


def _set_sync_debug_mode(mode: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it does not find every wait
        torch.cuda.set_sync_debug_mode(mode)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
