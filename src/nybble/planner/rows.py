"""What an MLP takes that runs by rows of the stream, as `nybble.models.fused.rows` does."""

from __future__ import annotations

from dataclasses import replace

from nybble.planner.halves import HalfTape, Saved
from nybble.planner.tape import Tape

_FP32 = 4


def by_rows_forward(tape: Tape, half: HalfTape, rows: int) -> None:
    """Leaves h, rstd, out and narrow_out."""
    tape.take("h", half.stream, "stream")
    tape.take("normed", half.stream, "norms")
    tape.take("rstd", half.rows(1, _FP32), "norms")
    tape.drop("normed")
    tape.take("out", half.stream, "stream")
    if half.back.parts:
        tape.take("narrow_out", half.rows(half.back.narrow), "low rank")
    chunk = replace(half, tokens=min(rows, half.tokens), held=set())
    with tape.within("chunk."), chunk.holding(tape):
        chunk.forward(tape, Saved(regions=False), known=True)
        tape.drop("out", "narrow_out", "normed_out")


def by_rows_again(tape: Tape, half: HalfTape, rows: int, *, known: bool) -> None:
    """The backward pass, each chunk of which is made again. The gradient of what it reads takes the place of >d."""
    if not known:
        tape.take("h", half.stream, "stream")
        tape.take("normed", half.stream, "norms")
        tape.take("rstd", half.rows(1, _FP32), "norms")
        tape.drop("normed")
    chunk = replace(half, tokens=min(rows, half.tokens), held=set())
    saved = Saved(regions=True, normed=False)
    with tape.within("chunk."), chunk.holding(tape):
        chunk.forward(tape, saved, known=True, replay=True)
        chunk.backward(tape, saved)
        tape.drop("d")
