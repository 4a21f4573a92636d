"""How long a run is and which micro-batch comes when: pure arithmetic over the number of sequences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

from nybble.config import TrainConfig
from nybble.data.collate import Batch, batches, num_batches
from nybble.data.example import Example
from nybble.data.prepare import DataReport
from nybble.train.processes import rank, world_size
from nybble.units import format_count


@dataclass(frozen=True)
class Course:
    """A run's length. Steps go on over the ends of epochs: only the run's very last one may have a short window."""

    micro_batches_per_epoch: int  # on each process
    total_micro_batches: int
    total_steps: int

    @classmethod
    def plan(cls, num_sequences: int, config: TrainConfig, num_processes: int = 1) -> Course:
        per_epoch = num_batches(num_sequences, config.batch_size, num_processes)
        if config.max_steps is not None:
            return cls(per_epoch, config.max_steps * config.gradient_accumulation, config.max_steps)
        total = max(1, round(config.epochs * per_epoch))
        return cls(per_epoch, total, math.ceil(total / config.gradient_accumulation))

    def line(self, report: DataReport, config: TrainConfig) -> str:
        """For printing: the data and the steps."""
        return (
            f"{report.rows} rows, {format_count(report.tokens)} tokens of which {format_count(report.target_tokens)} "
            f"carry loss; {self.total_steps} steps of {config.gradient_accumulation} x {config.batch_size} "
            f"sequences, {self.total_micro_batches / self.micro_batches_per_epoch:.2f} epochs"
        )


def training_batches(
    examples: Sequence[Example], config: TrainConfig, course: Course, *, first_step: int = 0, pad_token_id: int = 0
) -> Iterator[Batch]:
    """This process's micro-batches from the first of step `first_step + 1` on; each epoch has its own order."""
    done = first_step * config.gradient_accumulation
    endless = _endless(examples, config, divmod(done, course.micro_batches_per_epoch), pad_token_id)
    return islice(endless, course.total_micro_batches - done)


def evaluation_batches(examples: Sequence[Example], batch_size: int, *, pad_token_id: int = 0) -> Iterator[Batch]:
    """This process's share of the held-out rows, in their order."""
    return batches(
        examples,
        batch_size=batch_size,
        shuffle=False,
        rank=rank(),
        world_size=world_size(),
        pad_token_id=pad_token_id,
    )


def _endless(
    examples: Sequence[Example], config: TrainConfig, place: tuple[int, int], pad_token_id: int
) -> Iterator[Batch]:
    first_epoch, start = place
    for epoch in count(first_epoch):
        yield from batches(
            examples,
            batch_size=config.batch_size,
            seed=config.seed,
            epoch=epoch,
            rank=rank(),
            world_size=world_size(),
            start=start if epoch == first_epoch else 0,
            pad_token_id=pad_token_id,
        )
