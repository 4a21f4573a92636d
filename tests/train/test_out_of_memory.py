"""What is said where memory runs out: the phase, the bytes, and what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nybble.config import RunConfig
from nybble.errors import TrainingStopped
from nybble.memory.lack import is_out_of_memory
from nybble.train.out_of_memory import advice, describe, explain_out_of_memory
from nybble.train.run import run_training

CPU = torch.device("cpu")
MIB = 2**20


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has"), "1.50 GiB"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 2048 bytes."),
         "2.00 KiB"),
        (MemoryError("4096 bytes of host memory cannot be locked (CUDA error 2)"), "4.00 KiB"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), None),
    ],
)  # fmt: skip
def test_what_was_asked_for_is_said(error: Exception, asked: str | None) -> None:
    assert is_out_of_memory(error)
    told = describe(error, CPU)
    assert told.startswith("out of memory on cpu (")
    assert told.endswith(" held at the peak)")
    assert f"{asked} more were asked for" in told if asked else "asked" not in told


@pytest.mark.parametrize(("asked", "told"), [(256, "384.00 MiB left, in smaller pieces"), (512, "384.00 MiB left")])
def test_what_was_left_is_that_of_the_moment(monkeypatch: pytest.MonkeyPatch, asked: int, told: str) -> None:
    """Of 1,352 MiB, 968 were held as the error came; 584 are still."""
    figures = {"mem_get_info": (2000 * MIB, 2000 * MIB), "memory_reserved": 900 * MIB, "memory_allocated": 584 * MIB}
    figures |= {"get_per_process_memory_fraction": 1352 / 2000, "max_memory_allocated": 1000 * MIB}
    for name, figure in figures.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda _, figure=figure: figure)
    message = (
        f"CUDA out of memory. Tried to allocate {asked}.00 MiB. Of the allocated memory 968.00 MiB is allocated by "
        "PyTorch, with 8.00 MiB allocated in private pools, and 142.00 MiB is reserved by PyTorch but unallocated."
    )
    assert f", {told}, 1000.00 MiB held" in describe(torch.OutOfMemoryError(message), torch.device("cuda", 0))


def test_host_memory_is_told_from_the_devices() -> None:
    assert describe(MemoryError("8 bytes"), torch.device("cuda", 0)).startswith("out of memory on the host (8 B more")


def test_other_errors_are_not_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


def test_the_phase_and_the_way_out_are_named(settings: Callable[..., RunConfig]) -> None:
    with (
        pytest.raises(TrainingStopped) as stopped,
        explain_out_of_memory(settings(), CPU),
        explain_out_of_memory(settings(), CPU, during="loading", suggest=lambda: "Stream it."),
    ):
        torch.empty(2**60)
    assert (stopped.value.where, stopped.value.fix) == ("loading", "Stream it.")


@pytest.mark.parametrize(
    ("batch", "accumulation", "fewer", "more"), [(4, 1, 2, 2), (5, 1, 1, 5), (7, 3, 3, 7), (6, 1, 3, 2)]
)
def test_smaller_batches_are_of_as_many_sequences(
    settings: Callable[..., RunConfig], batch: int, accumulation: int, fewer: int, more: int
) -> None:
    given = {"train.batch_size": batch, "train.gradient_accumulation": accumulation}
    (line,) = (line for line in advice(settings(**given)) if line.startswith("train.batch_size"))
    assert line.startswith(f"train.batch_size={fewer} (")
    assert f"train.gradient_accumulation={more} (same numbers)" in line


def test_moments_that_must_stay_may_be_paged(settings: Callable[..., RunConfig]) -> None:
    assert any("memory.moments=paged" in line for line in advice(settings(**{"memory.moments": "resident"})))
    assert not any("memory.moments" in line for line in advice(settings()))


def test_a_run_says_in_which_phase_it_lacked_memory(
    settings: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB.")

    config = settings(**{"data.validation_fraction": 0.2, "train.max_steps": 2})
    for function, phase in (("evaluate", "evaluation"), ("preflight", "the check of one batch")):
        monkeypatch.setattr(f"nybble.train.cadence.{function}", fail)
        with pytest.raises(TrainingStopped, match=f"{phase}: out of memory on cpu \\(1.50 GiB more were asked for"):
            run_training(config.model_copy(update={"output": f"{config.output}-{function}"}), quiet=True)
