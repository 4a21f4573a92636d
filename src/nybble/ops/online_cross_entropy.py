"""Cross-entropy over a vocabulary whose head is there in chunks, one after the other, and each only once.

As attention's online softmax (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135): the gradient of
a row is sum_v p_v w_v - w_target, and p_v = exp(z_v - top) / total needs only a maximum and a sum over all v, which may
be known late. The target stands apart: p_target - 1 = -(sum over the others) / total, without the rounding of a p that
is nearly 1, so that a confident model's small gradients are as exact as when all logits are at hand.

Legend: rows = tokens that predict one; columns = words of a chunk, from `first` on; hidden.
State (3, rows), fp32: the largest logit of the other words so far, the sum of their exp(z - it), the target's logit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nybble.labels import IGNORED
from nybble.ops import triton
from nybble.ops.cross_entropy import capped
from nybble.ops.wide import add_product_, wide_dtype

LOWEST = -3.4e38  # instead of -inf, whose difference from itself is not a number


class OnlineCrossEntropy:
    """The losses of some rows, and with `with_gradient` those of the hidden states, from one pass over the head.

    hidden (rows, hidden) and targets (rows,) int64, IGNORED for none; logits are z = scale * x, or
    softcap * tanh(scale * x / softcap), of x = hidden W^T + bias in the dtype of `hidden`.
    """

    def __init__(
        self, hidden: Tensor, targets: Tensor, *, scale: float, softcap: float | None, with_gradient: bool
    ) -> None:
        self.hidden, self.targets, self.rule = hidden, targets, (scale, softcap)
        self.state = hidden.new_zeros((3, len(hidden)), dtype=wide_dtype(hidden))
        self.state[0] = LOWEST
        # Of the other words, times `total`; and the target's row of the head.
        self.gradient = torch.zeros_like(hidden, dtype=wide_dtype(hidden)) if with_gradient else None
        self.target_rows = torch.empty_like(hidden) if with_gradient else None

    def take(self, first: int, weight: Tensor, bias: Tensor | None) -> None:
        """Go on with the words from `first` on: weight (columns, hidden), bias (columns,)."""
        logits = torch.nn.functional.linear(self.hidden, weight, bias)
        online_cross_entropy_(
            logits, self.targets, first, weight, self.state, self.gradient, self.target_rows, *self.rule
        )
        if self.gradient is not None:
            add_product_(self.gradient, logits, weight)

    def finish(self, d_hidden: Tensor | None) -> Tensor:
        """Losses (rows,) in fp32, 0 where there is no target; their sum's gradient is written to d_hidden."""
        kept = self.gradient, self.target_rows
        losses: Tensor = online_cross_entropy_end(self.state, self.targets, *kept, d_hidden, *self.rule)
        return losses


@torch.library.custom_op("nybble::online_cross_entropy_", mutates_args={"logits", "state", "gradient", "target_rows"})
def online_cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    first: int,
    weight: Tensor,
    state: Tensor,
    gradient: Tensor | None,
    target_rows: Tensor | None,
    scale: float,
    softcap: float | None,
) -> None:
    """Bring the state (3, rows) up to date with logits (rows, columns) as the head gave them.

    With a gradient (rows, hidden), in fp32, it is scaled to the new maximum; `logits` becomes the factors of `weight`
    (columns, hidden) in what must be added to it, exp(z - top) dz/dx, 0 for the target's; and rows whose target is in
    this chunk get its row of `weight` in target_rows (rows, hidden). Without, `logits` may be left as they are.
    """
    z, slope = capped(logits.to(state.dtype), scale, softcap)
    here = (targets >= first) & (targets < first + logits.shape[1])
    column = (targets - first).where(here, 0)[:, None]
    state[2] = z.gather(1, column).squeeze(1).where(here, state[2])
    z = z.scatter(1, column, torch.where(here[:, None], float("-inf"), z.gather(1, column)))
    top = torch.maximum(state[0], z.amax(1))
    shrink = torch.exp(state[0] - top)
    factors = torch.exp(z - top[:, None])
    state[1] = state[1] * shrink + factors.sum(1)
    state[0] = top
    if gradient is not None and target_rows is not None:
        gradient *= shrink[:, None]
        counted = targets[:, None] != IGNORED
        logits.copy_((factors * slope).where(counted, 0.0))
        target_rows.copy_(weight.index_select(0, column.squeeze(1)).where(here[:, None], target_rows))


@online_cross_entropy_.register_fake
def _(*_arguments: object) -> None:
    pass


@torch.library.custom_op("nybble::online_cross_entropy_end", mutates_args={"d_hidden"})
def online_cross_entropy_end(
    state: Tensor,
    targets: Tensor,
    gradient: Tensor | None,
    target_rows: Tensor | None,
    d_hidden: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Each row's loss, (rows,), when all chunks have been taken; d_hidden (rows, hidden) becomes its gradient."""
    top, others, z = state
    highest = torch.maximum(top, z)
    others = others * torch.exp(top - highest)
    total = others + torch.exp(z - highest)
    counted = targets != IGNORED
    losses: Tensor = (total.log() + (highest - z)).where(counted, 0.0)
    if d_hidden is not None and gradient is not None and target_rows is not None:
        slope = scale if softcap is None else scale * (1 - (z / softcap).square())
        of_others = gradient * (torch.exp(top - highest) / total)[:, None]
        of_target = target_rows.to(state.dtype) * (slope * others / total)[:, None]
        d_hidden.copy_((of_others - of_target).where(counted[:, None], 0.0))
    return losses


@online_cross_entropy_end.register_fake
def _(state: Tensor, *_arguments: object) -> Tensor:
    return state.new_empty(state.shape[1])


if triton.available():

    @online_cross_entropy_.register_kernel("cuda")
    def _(*arguments: Any) -> None:
        from nybble.ops.triton import online_cross_entropy as kernels

        kernels.online_cross_entropy_(*arguments)

    @online_cross_entropy_end.register_kernel("cuda")
    def _(*arguments: Any) -> Tensor:
        from nybble.ops.triton import online_cross_entropy as kernels

        return kernels.online_cross_entropy_end(*arguments)
