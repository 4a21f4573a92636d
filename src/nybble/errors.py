"""What a user is told when something is wrong: what, where, and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """A mistake in what the user gave, found before anything was lost. The command line prints it and exits with 2.

    `what` says what is wrong, `where` the file, setting or tensor, `fix` what to do about it.
    """

    def __init__(self, what: str, *, where: object | None = None, fix: str | None = None) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.fix = fix
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n{self.fix}" if self.fix else head


class TrainingStopped(UserError):
    """Training could not go on (non-finite loss, out of memory); the last good checkpoint is kept."""


class TrainingDiverged(TrainingStopped):
    """The loss or the gradient is not finite: the same settings would end here again."""


def listed(what: str, problems: Sequence[str], *, most: int | None = None) -> str:
    """`what`, then each problem on a line of its own; of more than `most` of them, the first and how many are left."""
    left = 0 if most is None else max(0, len(problems) - most)
    shown = problems[: len(problems) - left]
    return "\n  ".join([what, *shown, *([f"and {left} more"] if left else [])])


def did_you_mean(word: str, known: list[str]) -> str | None:
    """The known word closest to a misspelt one, the first of equally close ones, or None if none is close."""
    from difflib import SequenceMatcher

    def likeness(name: str) -> float:
        # Parts and initials of a name are the commoner slips: `alpha` for `lora_alpha`, `lr` for `learning_rate`.
        parts = name.split("_")
        initials = "".join(part[:1] for part in parts)
        return max(SequenceMatcher(None, word, candidate).ratio() for candidate in (name, *parts, initials))

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best) >= 0.6 else None
