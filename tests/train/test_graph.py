"""Steps as graphs, decided without a GPU: when one is recorded, and that whatever fails leaves the run as it was.

The recorder here records nothing: replaying calls the function again, with the tensors that it was first called with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from nybble.errors import TrainingStopped
from nybble.optim.flat import FlatAdamW
from nybble.train.graph import GraphStep, NotRecorded
from nybble.train.retry import RetryingStep
from nybble.train.step import EagerStep
from nybble.train.window import Window
from tests.train.toy import Toy, eager_step, optimizer_of, run, state_of, window

LONG, SHORT, OTHER = [(2, 24), (1, 17)], [(1, 9)], [(2, 8)]
STEP_BYTES = 2**30


class Imitation:
    """What a Recorder does, without a GPU. refuse: the reason of which recordings fail. rooms: what there is of it."""

    def __init__(self, refuse: str | None = None, rooms: Sequence[int] = ()) -> None:
        self.refuse = refuse
        self.rooms = list(rooms)
        self.recorded = 0
        self.replayed = 0
        self.forgotten = 0
        self.watching = False
        self.alive: list[object] = []  # graphs that hold memory
        self.replaying = False

    def on_stream(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def no_waiting(self) -> Iterator[None]:
        self.watching = True
        try:
            yield
        finally:
            self.watching = False

    @contextlib.contextmanager
    def growth(self) -> Iterator[Callable[[], int]]:
        yield lambda: STEP_BYTES

    def room(self) -> int:
        return self.rooms.pop(0) if self.rooms else 2 * STEP_BYTES

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        if self.refuse:
            raise NotRecorded(self.refuse)
        self.recorded += 1

        def replay() -> None:
            assert replay in self.alive
            self.replayed += 1
            self.replaying = True
            function()
            self.replaying = False

        self.alive.append(replay)
        return replay

    def forget(self) -> None:
        self.forgotten += 1
        self.alive.clear()


def assert_as_eager(windows: list[Window], graph: GraphStep) -> list[str]:
    """The same bits after `windows` as eager steps have; returns the notes."""
    eager = eager_step(Toy())
    ours, notes = run(graph, windows)
    theirs, _ = run(eager, windows)
    assert ours == theirs
    assert all(torch.equal(a, b) for a, b in zip(state_of(graph.eager), state_of(eager), strict=True))
    assert len({figures.loss for figures in ours}) == len(ours)
    return notes


def test_the_third_window_of_a_shape_is_recorded() -> None:
    recorder = Imitation()
    shapes = [LONG, LONG, SHORT, LONG, LONG, SHORT, SHORT, LONG, OTHER, OTHER, OTHER, SHORT]
    windows = [window(each, seed) for seed, each in enumerate(shapes)]
    assert assert_as_eager(windows, GraphStep(eager_step(Toy()), recorder)) == []
    assert (recorder.recorded, recorder.replayed) == (2, 5)  # never the third shape


def test_windows_that_all_differ_are_not_recorded() -> None:
    recorder = Imitation()
    shapes = [[(1, 8 + length)] for length in (1, 2, 3, 4, 4, 4, 4)]
    windows = [window(each, seed) for seed, each in enumerate(shapes)]
    (note,) = assert_as_eager(windows, GraphStep(eager_step(Toy()), recorder))
    assert "the first 4 all differ in shape" in note
    assert recorder.recorded == 0


def test_a_recording_that_fails_leaves_eager_steps() -> None:
    recorder = Imitation(refuse="CUDA out of memory")
    windows = [window(LONG, seed) for seed in range(7)]
    (note,) = assert_as_eager(windows, GraphStep(eager_step(Toy()), recorder))
    assert note == "note: steps are not run as CUDA graphs: CUDA out of memory"
    assert recorder.forgotten == 1


def test_without_room_for_a_graph_steps_stay_eager() -> None:
    recorder = Imitation(rooms=[STEP_BYTES - 2**20])
    windows = [window(LONG, seed) for seed in range(7)]
    (note,) = assert_as_eager(windows, GraphStep(eager_step(Toy()), recorder))
    assert note == ("note: steps are not run as CUDA graphs: one would need 129.00 MiB more of the device's memory")
    assert recorder.recorded == 0


def test_paged_moments_make_room_for_a_graph_and_stay_away() -> None:
    recorder = Imitation(rooms=[STEP_BYTES - 2**20, 2 * STEP_BYTES])
    toy = Toy()
    eager = EagerStep(toy, optimizer_of(toy, moments="paged"), max_grad_norm=1.0)
    optimizer = eager.optimizer
    assert isinstance(optimizer, FlatAdamW)
    executor = RetryingStep(eager, GraphStep(eager, recorder), suggest=str)
    windows = [window(LONG, seed) for seed in range(7)]
    run(executor, windows[:2])
    assert optimizer.moves == 2  # home, where they begin, and to the device
    (note,) = run(executor, windows[2:])[1]
    assert "moments stay in host memory" in note
    assert (recorder.recorded, recorder.replayed, recorder.forgotten) == (1, 5, 0)
    assert optimizer.moves == 3
    assert not optimizer.evict()


def test_a_shape_without_room_beside_a_graph_stays_eager() -> None:
    """Its graph can use the first one's memory, and takes more."""
    recorder = Imitation(rooms=[2 * STEP_BYTES, -1])
    windows = [window(each, seed) for seed, each in enumerate([LONG, SHORT] * 5)]
    assert assert_as_eager(windows, GraphStep(eager_step(Toy()), recorder)) == []
    assert (recorder.recorded, recorder.replayed) == (1, 3)
    recorder = Imitation(rooms=[2 * STEP_BYTES, 0])
    assert assert_as_eager(windows, GraphStep(eager_step(Toy()), recorder)) == []
    assert (recorder.recorded, recorder.replayed) == (2, 6)


def test_why_there_are_no_graphs_is_told_where_memory_runs_out_too() -> None:
    recorder = Imitation(refuse="too complex")

    def before(toy: Toy) -> None:
        if toy.short_of_memory:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    toy = Toy(before=before)
    toy.short_of_memory = False
    graph = GraphStep(eager_step(toy), recorder)
    executor = RetryingStep(graph.eager, graph, suggest=str)
    run(executor, [window(LONG, seed) for seed in range(2)])
    toy.short_of_memory = True
    with pytest.raises(TrainingStopped, match=r"out of memory.*\n.*not run as CUDA graphs: too complex"):
        run(executor, [window(LONG, 2)])


def test_a_module_that_waits_is_found_out_before_it_is_recorded() -> None:
    """In the middle of a step, with gradients of the first micro-batch there already: the step is done again."""
    recorder = Imitation()
    calls = iter(range(100))

    def wait(_: Toy) -> None:
        if next(calls) % 2 and recorder.watching:
            raise RuntimeError("called a synchronizing CUDA operation\nsomewhere")

    windows = [window(LONG, seed) for seed in range(6)]
    (note,) = assert_as_eager(windows, GraphStep(eager_step(Toy(before=wait)), recorder))
    assert note.endswith(": called a synchronizing CUDA operation")
    assert recorder.recorded == 0


def lack_memory_beside_graphs(recorder: Imitation) -> Callable[[Toy], None]:
    def before(toy: Toy) -> None:
        if recorder.alive and toy.short_of_memory and not recorder.replaying:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    return before


@pytest.mark.parametrize("steps_before", [10, 30])
def test_memory_that_graphs_hold_is_given_back_where_it_lacks(steps_before: int) -> None:
    """They are made again, after a while if they had not been worth it."""
    recorder = Imitation()
    toy = Toy(before=lack_memory_beside_graphs(recorder))
    toy.short_of_memory = False
    graph = GraphStep(eager_step(toy), recorder)
    executor = RetryingStep(graph.eager, graph, suggest=str)
    windows = [window(LONG, seed) for seed in range(steps_before)]
    assert run(executor, windows)[1] == []
    toy.short_of_memory = True
    (note,) = run(executor, [window(OTHER, 4), window(LONG, 5)])[1]
    worthwhile = steps_before == 30
    assert note.endswith("without CUDA graphs" if worthwhile else "without CUDA graphs, as are the next 16")
    assert (recorder.recorded, recorder.forgotten) == (1 + worthwhile, 1)
    later = [window(LONG, seed) for seed in range(15)]
    assert run(executor, later)[1] == []  # beside the one behind the step that lacked memory
    assert recorder.recorded == 1 + worthwhile
    assert run(executor, [window(LONG, 6)])[1] == []
    assert recorder.recorded == 2
    eager = eager_step(Toy())
    for taken in (windows, [window(OTHER, 4), window(LONG, 5)], later, [window(LONG, 6)]):
        run(eager, taken)
    assert all(torch.equal(a, b) for a, b in zip(state_of(graph.eager), state_of(eager), strict=True))


def test_pauses_double_until_graphs_are_of_use() -> None:
    recorder, module = Imitation(), Toy()
    eager = EagerStep(module, optimizer_of(module), max_grad_norm=1.0)
    graph = GraphStep(eager, recorder)
    pauses = []
    for used in (10, 5, 5, 30, 5):
        while not graph.has_graph(window(LONG, 0)):
            graph.launch(window(LONG, 0), seed=0)
        for _ in range(used):
            graph.launch(window(LONG, 0), seed=0)
        assert graph.release()
        pauses.append(graph.pause)
    assert pauses == ["the next 16", "the next 32", "the next 64", "", "the next 16"]


def test_graphs_end_when_moments_move() -> None:
    """What they know is the address of moments that are elsewhere now."""
    recorder, module = Imitation(), Toy()
    eager = EagerStep(module, optimizer_of(module, moments="paged"), max_grad_norm=1.0)
    graph, other = GraphStep(eager, recorder), eager_step(Toy())
    for number in range(60):
        if number in (30, 40):
            assert eager.optimizer.restore_if_room() if number == 30 else eager.optimizer.evict()
        taken = window(LONG, number)
        note = graph.launch(taken, seed=number)
        other.launch(taken, seed=number)
        assert graph.read() == other.read()
        assert (note is not None and note.endswith("not run as a CUDA graph, nor are the next 16")) == (number == 40)
    assert (recorder.recorded, recorder.forgotten) == (3, 2)
    assert all(torch.equal(a, b) for a, b in zip(state_of(eager), state_of(other), strict=True))


def test_errors_that_graphs_do_not_cause_are_raised() -> None:
    def fail(_: Toy) -> None:
        raise RuntimeError("of its own")

    with pytest.raises(RuntimeError, match="of its own"):
        run(GraphStep(eager_step(Toy(before=fail)), Imitation()), [window(LONG, 0)])
