"""The MLP of a block by rows of the stream, so that what it needs does not grow with the tokens.

Gate, up and their product are 84 KB a token of 8B, in both passes: 29 GB at 350,000 tokens, where 4,096 rows at a time
take 0.35 GB. The stream at the norm is all that is kept for the backward pass, which makes each chunk again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nybble.models.fused.block import MlpHalf, Positions, Stream, masters, pair_behind
from nybble.models.fused.matrix import held_weight
from nybble.models.fused.projection import Pair, Projection
from nybble.models.fused.recompute import back_through
from nybble.models.fused.regions import Known, Norm, Projected, present


@dataclass(frozen=True)
class MlpByRows:
    """Computes what `mlp` does. Products of fewer rows may be summed in another order, and so round otherwise."""

    mlp: MlpHalf
    rows: int  # that go through it at a time

    @property
    def after(self) -> Norm | None:
        return self.mlp.after

    @property
    def projections(self) -> tuple[Projection, Projection]:
        return self.mlp.projections

    def __call__(
        self, stream: Stream, positions: Positions, *, known: Known | None = None, replay: bool = False
    ) -> tuple[Known, Projected]:
        residual, delta = stream
        h, rstd, base, narrow = _by_rows(
            self, positions, known, replay, delta.pair, delta.narrow, residual, delta.base, *masters([self.mlp])
        )
        return Known(h, rstd), Projected(base, narrow, pair_behind(self.mlp))

    def holding(self) -> AbstractContextManager[None]:
        """Within, each weight is materialized once for all chunks."""
        return held_weight(*(projection.matrix for projection in self.projections))

    def chunks(self, tokens: int) -> Iterator[slice]:
        for start in range(0, tokens, self.rows):
            yield slice(start, start + self.rows)


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        half: MlpByRows,
        positions: Positions,
        known: Known | None,
        replay: bool,
        pair: Pair | None,
        narrow: Tensor | None,
        residual: Tensor | None,
        base: Tensor,
        *_masters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if known is None:
            known = half.mlp.norm.of_sum(residual, Projected(base, narrow, pair))[0]
        ctx.half, ctx.positions, ctx.has_residual = half, positions, residual is not None
        ctx.save_for_backward(*known)
        ctx.set_materialize_grads(False)
        if replay:  # what looks like the output, without its memory
            output, narrow = known.h.new_empty(1).expand_as(known.h), None
        else:
            output, narrow = _forward(half, known, positions)
        ctx.mark_non_differentiable(known.rstd, *present(narrow))
        return *known, output, narrow

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_h: Tensor, _d_rstd: None, d_base: Tensor, _d_narrow: None) -> tuple[Tensor | None, ...]:
        half: MlpByRows = ctx.half
        whole = Known(*ctx.saved_tensors)
        wanted = any(ctx.needs_input_grad[6:8])
        with half.holding():
            for chunk in half.chunks(len(whole.h)):
                h = whole.h[chunk].detach().requires_grad_(wanted)
                with torch.enable_grad():
                    known = Known(h, whole.rstd[chunk])
                    made, delta = half.mlp((None, Projected(h)), ctx.positions, known=known, replay=True)
                back_through([(made.h, None if d_h is None else d_h[chunk]), (delta.base, d_base[chunk])])
                if h.grad is not None:
                    d_base[chunk] = h.grad
        # The norm behind made d_base, for this function alone: what it reads row by row becomes what it gives.
        d = d_base if wanted else None
        # What trains within got its gradients there.
        return *6 * (None,), d if ctx.has_residual else None, d, *len(masters([half.mlp])) * (None,)


def _forward(half: MlpByRows, whole: Known, positions: Positions) -> tuple[Tensor, Tensor | None]:
    """Base output (tokens, hidden) and narrow (tokens, r) of the last projection."""
    output = torch.empty_like(whole.h)
    pair = pair_behind(half.mlp)
    narrow = None if pair is None else output.new_empty(len(output), pair.A.shape[0])
    with half.holding():
        for chunk in half.chunks(len(output)):
            h = whole.h[chunk]
            _, delta = half.mlp((None, Projected(h)), positions, known=Known(h, whole.rstd[chunk]))
            output[chunk] = delta.base
            if narrow is not None and delta.narrow is not None:
                narrow[chunk] = delta.narrow
    return output, narrow


_by_rows: Callable[..., Any] = _ByRows.apply
