"""A sequence as it is trained on: one sample, or several packed one behind the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

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


def joined(examples: Sequence[Example]) -> dict[str, Tensor]:
    """All examples one behind another in a few tensors; `divided` is the way back."""
    lengths = [example.lengths for example in examples]
    return {
        "input_ids": torch.cat([torch.empty(0, dtype=torch.int32), *(example.input_ids for example in examples)]),
        "trained": torch.cat([torch.empty(0, dtype=torch.bool), *(example.trained for example in examples)]),
        "tokens": torch.tensor([len(example) for example in examples], dtype=torch.int64),
        "samples": torch.tensor([len(held) for held in lengths], dtype=torch.int64),
        "lengths": torch.tensor([length for held in lengths for length in held], dtype=torch.int64),
        "rows": torch.tensor([example.row for example in examples], dtype=torch.int64),
    }


def divided(tensors: Mapping[str, Tensor]) -> list[Example]:
    """The examples of which `joined` made `tensors`; their tokens are views."""
    tokens = tensors["tokens"].tolist()
    lengths = iter(tensors["lengths"].tolist())
    held = [tuple(islice(lengths, count)) for count in tensors["samples"].tolist()]
    input_ids, trained = (tensors[name].split_with_sizes(tokens) for name in ("input_ids", "trained"))
    return [Example(*parts) for parts in zip(input_ids, trained, held, tensors["rows"].tolist(), strict=True)]
