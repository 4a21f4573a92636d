"""The loss under a head that goes through the device by chunks, once for thousands of tokens: from host memory, or
out of NF4.

Legend: tokens; vocabulary = rows of the head; hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nybble.memory.head import Chunks, PassingHead
from nybble.models.logits import LogitRule
from nybble.ops.head_chunks import CHUNK_BYTES, ChunkSizes
from nybble.ops.online_cross_entropy import OnlineCrossEntropy

Losses = Callable[[Tensor, Tensor], Tensor]


class StreamedLoss:
    """Cross-entropy of hidden states under a head that passes, with the gradient taken in the forward pass."""

    def __init__(self, head: PassingHead, rule: LogitRule) -> None:
        self.head, self.rule = head, rule

    @contextlib.contextmanager
    def coming(self, tokens: int) -> Iterator[Losses]:
        """Have the head set off for the losses of `tokens` rows at most: its first chunks come meanwhile.

        Gives a function of hidden states (rows, hidden) and targets (rows,), to be called once, that returns the
        rows' losses in fp32, 0 for an IGNORED target. It overwrites hidden states that require a gradient with it.
        """
        head = self.head
        sizes = ChunkSizes.within(
            CHUNK_BYTES,
            tokens,
            head.out_features,
            head.in_features,
            value_bytes=head.compute_dtype.itemsize,
            bytes_a_row=head.bytes_a_row,
        )
        with self.head.passing(sizes.vocabulary, passes=-(-tokens // sizes.tokens)) as passage:
            yield lambda hidden, targets: _streamed_losses(self, passage, sizes.tokens, hidden, targets)


class _StreamedLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: StreamedLoss, passage: Chunks, tokens: int, hidden: Tensor, targets: Tensor) -> Tensor:
        with_gradient = ctx.needs_input_grad[3]
        bias, rule = loss.head.bias, loss.rule
        losses = []
        for start in range(0, max(len(hidden), 1), tokens):
            rows = hidden[start : start + tokens]
            online = OnlineCrossEntropy(
                rows,
                targets[start : start + tokens],
                scale=rule.scale,
                softcap=rule.softcap,
                with_gradient=with_gradient,
            )
            for first, weight in passage.chunks() if len(rows) else ():
                words = slice(first, first + len(weight))
                online.take(first, weight.to(rows.dtype), None if bias is None else bias[words].to(rows.dtype))
            # The rows have been read for the last time: what becomes their gradient needs no memory of its own, which
            # for 350,000 tokens of 8B would be 2.9 GB.
            losses.append(online.finish(rows if with_gradient else None))
            del online  # before the next rows have gradients of their own
        ctx.save_for_backward(hidden)
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor | None, ...]:
        (d_hidden,) = ctx.saved_tensors
        return None, None, None, d_hidden.mul_(d_losses[:, None]), None


_streamed_losses: Callable[..., Tensor] = _StreamedLosses.apply
