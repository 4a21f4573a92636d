"""Steps that run out of memory are done again, rung by rung, to the bits of a run that has enough.

The device here is made of numbers: a module that fails while too much is held.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from nybble.errors import TrainingStopped
from nybble.optim.flat import FlatAdamW
from nybble.train.retry import RetryingStep
from nybble.train.step import EagerStep
from tests.train.toy import Toy, eager_step, optimizer_of, run, state_of, window

SHORT, LONG, LONGER = [(2, 8), (1, 8)], [(1, 8), (2, 20)], [(1, 60)]
NEEDED = {16: 0, 40: 10, 60: 20}  # units of memory of a micro-batch, by its tokens


class Scarce(Toy):
    """Has 20 units of memory, of which moments on the device take 15; leaner, a window takes half.

    Runs out of it in the backward pass of the micro-batch that needs too much.
    """

    held_by_moments: Callable[[], int]
    lean = False
    attempts = 0
    memory = 20

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> Tensor:
        needed = NEEDED.get(input_ids.numel(), 0) // (2 if self.lean else 1)
        loss = super().forward(input_ids, labels, position_ids)

        def backward(gradient: Tensor) -> Tensor:
            self.attempts += 1
            if needed + self.held_by_moments() > self.memory:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has")
            return gradient

        loss.register_hook(backward)
        return loss

    @contextlib.contextmanager
    def leaner(self) -> Iterator[None]:
        self.lean = True
        try:
            yield
        finally:
            self.lean = False


def retrying(module: Toy, moments: str = "paged", **options: object) -> RetryingStep:
    optimizer = optimizer_of(module, moments=moments)
    module.held_by_moments = lambda: 15 * resident(optimizer)
    return RetryingStep(EagerStep(module, optimizer, max_grad_norm=1.0), suggest=lambda: "Give it less.", **options)


def resident(optimizer: FlatAdamW) -> bool:
    """Moments at home lie in one buffer with each other."""
    first, second = optimizer.flats[0].moments.values()
    return first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()


def assert_as_with_enough(executor: RetryingStep, shapes: list[list[tuple[int, int]]]) -> list[str]:
    """Same bits as steps of a Toy that never lacks memory; returns the notes."""
    windows = [window(each, seed) for seed, each in enumerate(shapes)]
    eager = eager_step(Toy())
    ours, notes = run(executor, windows)
    theirs, _ = run(eager, windows)
    assert ours == theirs
    assert all(torch.equal(a, b) for a, b in zip(state_of(executor.eager), state_of(eager), strict=True))
    return notes


def test_moments_leave_while_a_step_needs_their_memory() -> None:
    module = Scarce()
    executor = retrying(module)
    (note,) = assert_as_with_enough(executor, [SHORT, SHORT, LONG])
    assert note == (
        "note: the backward pass of micro-batch 2 of 2 (2 x 20 tokens): out of memory on cpu (1.50 GiB more were "
        f"asked for, {note.partition('for, ')[2].partition(' held')[0]} held at the peak); the step was done again "
        "with the optimizer's moments in host memory"
    )
    assert not resident(executor.optimizer)


def test_they_come_back_and_leave_beforehand_when_such_a_step_comes_again() -> None:
    module = Scarce()
    executor = retrying(module)
    shapes, places = [SHORT, LONG, SHORT, LONG, LONG, SHORT], []
    for number, each in enumerate(shapes):
        executor.launch(window(each, number), seed=number)
        places.append(resident(executor.optimizer))
    assert places == [True, False, True, False, False, True]
    assert module.attempts == 2 * len(shapes) + 2  # one step was done twice
    assert len(assert_as_with_enough(retrying(Scarce()), shapes)) == 1


def test_activations_are_what_is_given_up_last() -> None:
    module = Scarce()
    module.memory = 19
    executor = retrying(module)
    (note,) = assert_as_with_enough(executor, [SHORT, LONGER, SHORT, LONGER, SHORT])
    moments, activations = note.splitlines()
    assert moments.endswith("with the optimizer's moments in host memory")
    assert activations.endswith("with fewer activations kept")
    assert module.attempts == 2 + 3 + 2 + 1 + 2
    assert resident(executor.optimizer)
    assert not module.lean


def test_resident_moments_stay_and_activations_are_given_up() -> None:
    executor = retrying(Scarce(), moments="resident")
    (note,) = assert_as_with_enough(executor, [SHORT, LONG, SHORT])
    assert note.endswith("with fewer activations kept")


def test_an_error_comes_when_nothing_is_left_to_give_up() -> None:
    module = Scarce()
    module.memory = 9
    executor = retrying(module)
    before = state_of(executor.eager)
    with pytest.raises(TrainingStopped) as stopped:
        executor.launch(window(LONGER, 0), seed=0)
    assert stopped.value.where == "the backward pass of micro-batch 1 of 1 (1 x 60 tokens)"
    assert stopped.value.what.startswith("out of memory on cpu (1.50 GiB more were asked for, ")
    assert stopped.value.fix == "Give it less."
    assert module.attempts == 3
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(executor.eager), strict=True))


def test_what_a_window_needs_is_known_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Scarce()
    executor = retrying(module, window_bytes=lambda shapes: max(NEEDED[shape.numel()] for shape in shapes))
    nbytes = sum(moment.nbytes for flat in executor.optimizer.flats for moment in flat.moments.values())
    monkeypatch.setattr("nybble.memory.paging.available_bytes", lambda _: nbytes + module.memory - 15)
    monkeypatch.setattr("nybble.train.retry.available_bytes", lambda _: module.memory - module.held_by_moments())
    assert assert_as_with_enough(executor, [[(2, 8)], [(1, 60)], [(2, 20)], [(1, 16)], [(1, 60)]]) == []
    assert module.attempts == 5


def test_other_errors_are_raised() -> None:
    module = Scarce()
    module.bias.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        retrying(module).launch(window(SHORT, 0), seed=0)
    assert module.attempts == 1


def test_optimizers_of_others_are_not_retried() -> None:
    """They are there for several processes, of which none can do a step again alone."""
    module = Scarce()
    module.held_by_moments = lambda: 15
    eager = EagerStep(module, torch.optim.AdamW(module.parameters(), lr=0.1), max_grad_norm=1.0)
    executor = RetryingStep(eager, suggest=str)
    executor.launch(window(SHORT, 0), seed=0)
    with pytest.raises(TrainingStopped):
        executor.launch(window(LONGER, 0), seed=0)
    assert module.attempts == 3


def test_what_comes_between_steps_gets_the_memory_of_moments() -> None:
    executor = retrying(Scarce())
    executor.launch(window(SHORT, 0), seed=0)
    calls = []

    def evaluate() -> str:
        calls.append(resident(executor.optimizer))
        if calls[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return "done"

    assert executor.beside("evaluation", evaluate) == "done"
    assert calls == [True, False]
    with pytest.raises(TrainingStopped, match="evaluation: out of memory on cpu"):
        executor.beside("evaluation", lambda: torch.empty(2**60))
    executor.launch(window(SHORT, 1), seed=1)
    assert resident(executor.optimizer)
