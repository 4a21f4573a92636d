"""What an MLP takes that runs by rows of the stream, as `nybble.models.fused.rows` does."""

from __future__ import annotations

from dataclasses import replace

from nybble.planner.halves import HalfTape, Saved
from nybble.planner.tape import Tape

_FP32 = 4


def by_rows_forward(tape: Tape, half: HalfTape, rows: int) -> None:
    """Leaves h, rstd, out and narrow_out."""
    _read_stream(tape, half)
    tape.take("out", half.stream, "stream")
    if half.back.parts:
        tape.take("narrow_out", half.rows(half.back.narrow), "low rank")
    chunk = _chunk(half, rows)
    with tape.within("chunk."), chunk.holding(tape):
        for first in _two(half, rows):
            if not first:  # what the chunk before gave is held by its name until there is another
                tape.take("out before", chunk.stream, "stream")
                tape.take("narrow before", chunk.rows(half.back.narrow), "low rank")
            chunk.forward(tape, Saved(regions=False), known=True)
            tape.drop("out", "narrow_out", "normed_out", "out before", "narrow before")


def by_rows_again(tape: Tape, half: HalfTape, rows: int, *, known: bool, replay: bool) -> None:
    """What is made before the backward pass begins: h and rstd unless they are known, and if not `replay` all."""
    if not replay:
        by_rows_forward(tape, half, rows)
    else:
        if not known:
            _read_stream(tape, half)
        tape.take("out", 1, "stream")


def by_rows_backward(tape: Tape, half: HalfTape, rows: int) -> None:
    """Each chunk is made again. The gradient of what the half reads takes the place of >d."""
    chunk, saved = _chunk(half, rows), Saved(regions=True, normed=False)
    tape.drop("out", "narrow_out")
    with tape.within("chunk."), chunk.holding(tape):
        for first in _two(half, rows):
            if not first:
                tape.take("d before", chunk.stream, "activation gradients")
                if chunk.sandwiched:
                    tape.take("out before", chunk.stream, "norms")
            chunk.forward(tape, saved, known=True, replay=True)
            tape.drop("d before", "out before")
            chunk.backward(tape, saved)
            tape.drop("d")


def _read_stream(tape: Tape, half: HalfTape) -> None:
    tape.take("h", half.stream, "stream")
    tape.take("rstd", half.rows(1, _FP32), "norms")
    tape.touch("normed", half.stream, "norms")


def _two(half: HalfTape, rows: int) -> list[bool]:
    """Whether each chunk is the first, up to the second: those that follow take what it does."""
    return [True, False] if rows < half.tokens else [True]


def _chunk(half: HalfTape, rows: int) -> HalfTape:
    return replace(half, tokens=min(rows, half.tokens), held=set())
