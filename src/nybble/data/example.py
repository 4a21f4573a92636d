"""A sequence as it is trained on: one sample, or several packed one behind the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.labels import IGNORED


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """Tokens of one or more samples.

    `input_ids` (tokens,) int32; `trained` (tokens,) bool: which tokens carry loss; `lengths`: tokens of each sample;
    what is left is padding. `row`: index of the row it was made from, of the first one if packed.
    """

    input_ids: Tensor
    trained: Tensor
    lengths: tuple[int, ...]
    row: int

    def __len__(self) -> int:
        return self.input_ids.numel()

    @property
    def labels(self) -> Tensor:
        """(tokens,) int64, not shifted; a sample's first token has no predecessor to be predicted from."""
        return torch.where(self.trained, self.input_ids, IGNORED).long()

    @property
    def position_ids(self) -> Tensor:
        """(tokens,) int64; they begin again with each sample, and with the padding."""
        padding = len(self) - sum(self.lengths)
        return torch.cat([torch.arange(length) for length in (*self.lengths, padding)])

    @property
    def target_tokens(self) -> int:
        return int(self.trained.sum())


def single(input_ids: Tensor, trained: Tensor, row: int) -> Example:
    """One sample. Its first token is never trained: nothing precedes it."""
    trained = trained.clone()
    trained[:1] = False
    return Example(input_ids, trained, (input_ids.numel(),), row)
