"""Halves of blocks whose activations are made again in the backward pass, from the stream that the first one read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nybble.memory.offload import HostStore
from nybble.models.fused.block import Half, MlpHalf, Positions, Stream, masters, pair_behind, through
from nybble.models.fused.matrix import held_weight
from nybble.models.fused.projection import Pair
from nybble.models.fused.regions import Known, Projected, present


@dataclass(frozen=True)
class Segment:
    """Halves of blocks, one behind the other, of which only the stream at the first norm is kept, on card or host.

    In the backward pass they are made again but for what nobody reads then, the last product. With two halves of a
    block as segments of their own that is both products that add to the stream: in 8B at 8k tokens 54 ms of the 196
    that a forward pass takes. And gate, up and what attention reads are never there at the same time.
    """

    halves: Sequence[Half]
    store: HostStore | None

    def __call__(self, stream: Stream, positions: Positions) -> Stream:
        residual, delta = stream
        trained = masters(self.halves)
        inputs = [tensor for tensor in (residual, delta.base, *trained) if tensor is not None]
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)):
            return through(self.halves, stream, positions)
        h, base, narrow = _recomputed(self, positions, delta.pair, delta.narrow, residual, delta.base, *trained)
        return h, Projected(base, narrow, pair_behind(self.halves[-1]))

    def holding(self) -> AbstractContextManager[None]:
        """Within, the widest weight of the last half serves the product and the gradient that follows it at once."""
        last = self.halves[-1]
        return held_weight(last.gate_up.matrix, one_gradient=True) if isinstance(last, MlpHalf) else nullcontext()


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        segment: Segment,
        positions: Positions,
        pair: Pair | None,
        narrow: Tensor | None,
        residual: Tensor | None,
        base: Tensor,
        *_masters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        first, *others = segment.halves
        known, delta = first((residual, Projected(base, narrow, pair)), positions)
        ctx.segment, ctx.positions, ctx.has_residual = segment, positions, residual is not None
        if segment.store is None:
            ctx.save_for_backward(*known)
        else:
            ctx.save_for_backward(known.rstd)
            ctx.ticket = segment.store.put(known.h.detach())
        h, delta = through(others, (known.h, delta), positions)
        assert h is not None
        ctx.mark_non_differentiable(*present(delta.narrow))
        ctx.set_materialize_grads(False)
        return h, delta.base, delta.narrow

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_h: Tensor | None, d_base: Tensor | None, _d_narrow: None) -> tuple[Tensor | None, ...]:
        segment: Segment = ctx.segment
        if segment.store is None:
            h, rstd = ctx.saved_tensors
        else:
            (rstd,), h = ctx.saved_tensors, segment.store.get(ctx.ticket)
        h = h.detach().requires_grad_(any(ctx.needs_input_grad[4:6]))
        *others, last = segment.halves
        stream: Stream = None, Projected(h)
        known: Known | None = Known(h, rstd)
        with segment.holding():
            with torch.enable_grad():
                for half in others:
                    made, delta = half(stream, ctx.positions, known=known)
                    stream, known = (made.h, delta), None
                made, delta = last(stream, ctx.positions, known=known, replay=True)
            del stream, known
            back_through([(made.h, d_h), (delta.base, d_base)])
        # What trains within got its gradients there.
        return (
            None,
            None,
            None,
            None,
            h.grad if ctx.has_residual else None,
            h.grad,
            *len(masters(segment.halves)) * (None,),
        )


def back_through(ends: Sequence[tuple[Tensor, Tensor | None]]) -> None:
    """The backward pass of a graph from its ends and their gradients, those that there are."""
    used = [(end, gradient) for end, gradient in ends if end.requires_grad and gradient is not None]
    torch.autograd.backward([end for end, _ in used], [gradient for _, gradient in used])


_recomputed: Callable[..., Any] = _Recomputed.apply
