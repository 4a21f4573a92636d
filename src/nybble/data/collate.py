"""Batches of examples in an order that depends on the seed, the epoch and nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.data.example import Example
from nybble.labels import IGNORED


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch, each tensor (batch, seq_len) int64. `labels` are not shifted, and -100 where there is no loss."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    target_tokens: int

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            self.target_tokens,
        )


def batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    pad_token_id: int = 0,
    pad_to_multiple: int = 1,
) -> Iterator[Batch]:
    """This rank's micro-batches of one epoch, from number `start` on; every rank gets as many.

    The rule for several ranks: micro-batch k of all ranks together is micro-batch k of one process with
    `batch_size * world_size`, dealt out like cards. The last one is smaller if the examples run out; a rank that then
    gets none receives one example without loss, so that all ranks take part in every step.
    """
    order = epoch_order(len(examples), seed=seed, epoch=epoch, shuffle=shuffle)
    whole = batch_size * world_size
    for first in range(start * whole, len(order), whole):
        chunk = order[first : first + whole]
        mine = [examples[index] for index in chunk[rank::world_size]]
        batch = collate(mine or [examples[chunk[0]]], pad_token_id=pad_token_id, pad_to_multiple=pad_to_multiple)
        yield batch if mine else _without_loss(batch)


def num_batches(num_examples: int, batch_size: int, world_size: int = 1) -> int:
    """Micro-batches of one epoch, on each rank."""
    return -(-num_examples // (batch_size * world_size))


def epoch_order(num_examples: int, *, seed: int, epoch: int, shuffle: bool) -> list[int]:
    order = list(range(num_examples))
    if shuffle:
        random.Random(f"order of examples {seed} {epoch}").shuffle(order)
    return order


def collate(examples: Sequence[Example], *, pad_token_id: int = 0, pad_to_multiple: int = 1) -> Batch:
    """Examples padded on the right to the longest, rounded up to a multiple.

    Padding needs no attention mask: no earlier token sees it, and it has no loss. Its positions go on counting, so
    that it does not look like another packed sample.
    """
    longest = max(len(example) for example in examples)
    seq_len = -(-longest // pad_to_multiple) * pad_to_multiple
    input_ids = torch.full((len(examples), seq_len), pad_token_id)
    labels = torch.full((len(examples), seq_len), IGNORED)
    position_ids = torch.empty((len(examples), seq_len), dtype=torch.int64)
    for line, example in enumerate(examples):
        tokens = len(example)
        input_ids[line, :tokens] = example.input_ids
        labels[line, :tokens] = example.labels
        positions = example.position_ids
        position_ids[line, :tokens] = positions
        position_ids[line, tokens:] = torch.arange(seq_len - tokens) + positions[-1] + 1
    return Batch(input_ids, labels, position_ids, sum(example.target_tokens for example in examples))


def _without_loss(batch: Batch) -> Batch:
    return Batch(batch.input_ids, torch.full_like(batch.labels, IGNORED), batch.position_ids, 0)
