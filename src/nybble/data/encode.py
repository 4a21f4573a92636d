"""Rendered text as tokens, and which of them carry loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nybble.data.example import Example, single
from nybble.data.template import Rendered, Span, special_texts
from nybble.errors import UserError

_BATCH = 256  # texts a call of the tokenizer: enough for its threads, and a progress bar still moves


@dataclass(frozen=True, slots=True)
class Encoded:
    """A sample, cut to the length asked for.

    `truncated`: it was cut. `ends`: its last token ends a turn or the text, and carries loss.
    `leading_bos`: how many BOS it begins with.
    """

    example: Example
    truncated: bool
    ends: bool
    leading_bos: int


class Encoder:
    """Tokenizes whole texts, so that token boundaries are those of the whole text and never of its parts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                "the tokenizer cannot say which characters a token covers, which the loss mask needs",
                where=type(tokenizer).__name__,
                fix="Use a checkpoint with a tokenizer.json.",
            )
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token, so a model could not learn to stop", where="tokenizer")
        self._tokenizer = tokenizer
        self.max_length = max_length
        self._bos: int | None = tokenizer.bos_token_id
        self._eos: int = tokenizer.eos_token_id
        self._end_ids = {tokenizer.convert_tokens_to_ids(text) for text in special_texts(tokenizer)}

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer begins a text with BOS by itself."""
        return self._bos is not None and self._tokenizer("a", verbose=False).input_ids[0] == self._bos

    def encode(self, rendered: Sequence[tuple[int, Rendered]]) -> Iterator[Encoded]:
        """Samples of (row, rendering), in their order."""
        waiting = iter(rendered)
        while batch := list(islice(waiting, _BATCH)):
            encoded = self._tokenizer(
                [text.text for _, text in batch],
                add_special_tokens=False,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
            for (row, text), ids, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                yield self._finish(row, text, ids, offsets)

    def _finish(self, row: int, text: Rendered, ids: list[int], offsets: Sequence[Span]) -> Encoded:
        # numpy reads lists 4 times as fast as torch, and pairs 9 times.
        flat = np.fromiter(chain.from_iterable(offsets), dtype=np.int64, count=2 * len(offsets))
        trained = overlap(torch.from_numpy(flat).view(-1, 2), text.spans)
        if text.add_bos and self.adds_bos and ids[:1] != [self._bos]:
            ids, trained = [self._bos, *ids], torch.cat([trained.new_zeros(1), trained])  # type: ignore[list-item]
        if text.add_eos and ids[-1:] != [self._eos]:
            ids, trained = [*ids, self._eos], torch.cat([trained, trained.new_ones(1)])
        cut = len(ids) > self.max_length
        tokens = torch.from_numpy(np.array(ids[: self.max_length], dtype=np.int32))
        example = single(tokens, trained[: self.max_length], row)
        return Encoded(example, cut, self._ends(example), self._leading_bos(ids))

    def _ends(self, example: Example) -> bool:
        """Whether the last trained token is an end: what follows it is for the template to add."""
        positions = example.trained.nonzero()
        return len(positions) > 0 and int(example.input_ids[positions[-1]]) in self._end_ids

    def _leading_bos(self, ids: list[int]) -> int:
        return next((count for count, token in enumerate(ids) if token != self._bos), len(ids))


def overlap(offsets: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Which tokens carry loss: those with a character in a span. `offsets` (tokens, 2) -> (tokens,) bool.

    A token that also covers characters before the span counts: the model has to produce it to say the rest.
    """
    start, end = offsets.unbind(-1)
    trained = torch.zeros(len(offsets), dtype=torch.bool)
    for span_start, span_end in spans:
        trained |= (start < span_end) & (end > span_start)
    return trained
