"""The regions of a block, each one node of the autograd graph: from one matrix product to the next.

A region takes the base output and `narrow` of a projection, whose low-rank product it adds on the way, does what the
model does with the sum, and feeds the next projection. In backward it is the other way round. Trained tensors are
inputs of the region that needs them: B of the projection before it, A of the one after it.

Legend: tokens = batch * seq_len; hidden; r = rank; base, narrow: see `nybble.models.fused.projection`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nybble.models.fused.projection import Pair, Projection
from nybble.ops.glu import glu, glu_backward_
from nybble.ops.norm import add_low_rank, add_norm, norm, norm_backward
from nybble.ops.rope import split_rope, split_rope_backward

Gradients = tuple[Tensor | None, ...]


class Projected(NamedTuple):
    """What a projection made: y = base + scaling * narrow B^T, where `pair` (None: y = base) has scaling and B."""

    base: Tensor
    narrow: Tensor | None = None
    pair: Pair | None = None

    @property
    def low_rank(self) -> tuple[Tensor | None, Tensor | None, float]:
        """narrow, B and scaling, as the ops take them."""
        return (self.narrow, self.pair.B, self.pair.scaling) if self.pair else (None, None, 1.0)

    @property
    def masters(self) -> tuple[Tensor, ...]:
        return self.pair.b_masters if self.pair else ()

    @property
    def parts(self) -> int:
        return self.pair.parts if self.pair else 1

    def backward(self, gradient: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of narrow and of the masters of B, from that of y."""
        return self.pair.backward(gradient, self.narrow) if self.pair and self.narrow is not None else (None, [])


@dataclass(frozen=True)
class Norm:
    """RMS norm: h / rms(h) * (weight + offset)."""

    weight: Tensor  # (hidden,)
    eps: float
    offset: float  # 1 in Gemma


@dataclass(frozen=True)
class Heads:
    """How q, k and v lie in the output of their projection, and the norms that Qwen3 and Gemma 3 give each head."""

    num_heads: int
    num_kv_heads: int
    q_norm: Tensor | None = None  # (head_dim,)
    k_norm: Tensor | None = None
    eps: float = 0.0
    offset: float = 0.0


def add_norm_project(
    residual: Tensor | None, delta: Projected, rule: Norm, projection: Projection, *, known: Tensor | None = None
) -> tuple[Tensor, Projected]:
    """h = residual + delta, (tokens, hidden), and the projection of its norm. residual None: h = delta.

    known: h, if it was kept from an earlier pass; the values of residual and delta do not count then.
    """
    h, base, narrow = _add_norm_project(
        rule, projection, known, delta.pair, residual, delta.base, delta.narrow, *delta.masters, *projection.a_masters
    )
    return h, Projected(base, narrow, projection.pair)


def add_and_norm(residual: Tensor | None, delta: Projected, rule: Norm) -> Tensor:
    """The norm of residual + delta, (tokens, hidden)."""
    output: Tensor = _add_norm(rule, delta.pair, residual, delta.base, delta.narrow, *delta.masters)
    return output


def add(residual: Tensor | None, delta: Projected) -> Tensor:
    """residual + delta, (tokens, hidden), of which autograd knows nothing."""
    return cast(Tensor, add_low_rank(residual, delta.base, *delta.low_rank))


def rotated_heads(qkv: Projected, heads: Heads, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (tokens, num_heads, head_dim), k and v (tokens, num_kv_heads, head_dim); cos, sin (tokens, rotary_dim)."""
    q, k, v = _rotated_heads(heads, cos, sin, qkv.pair, qkv.base, qkv.narrow, *qkv.masters)
    return q, k, v


def project(x: Tensor, projection: Projection, *, replay: bool = False) -> Projected:
    """The projection of x (tokens, in). replay: as `Projection` takes it."""
    base, narrow = _project(projection, replay, x, *projection.a_masters)
    return Projected(base, narrow, projection.pair)


def glu_project(gate_up: Projected, activation: str, projection: Projection, *, replay: bool = False) -> Projected:
    """The projection of act(gate) * up. Its backward pass overwrites gate_up.base, which nobody else may read then."""
    base, narrow = _glu_project(
        activation,
        projection,
        replay,
        gate_up.pair,
        gate_up.base,
        gate_up.narrow,
        *gate_up.masters,
        *projection.a_masters,
    )
    return Projected(base, narrow, projection.pair)


class _Region(torch.autograd.Function):
    """Gradients that are None stay None: an output that nobody used, or a narrow that there is not."""

    @staticmethod
    def keep(ctx: Any, *tensors: Tensor | None) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)


class _AddNormProject(_Region):
    @staticmethod
    def forward(
        ctx: Any,
        rule: Norm,
        projection: Projection,
        known: Tensor | None,
        pair: Pair | None,
        residual: Tensor | None,
        base: Tensor,
        narrow: Tensor | None,
        *_masters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if residual is None and narrow is None:
            known = base
        if known is not None:
            h, (normed, rstd) = known, norm(known, rule.weight, rule.eps, rule.offset)
        else:
            delta = Projected(base, narrow, pair)
            h, normed, rstd = add_norm(residual, base, *delta.low_rank, rule.weight, rule.eps, rule.offset)
        ctx.rule, ctx.projection, ctx.pair, ctx.has_residual = rule, projection, pair, residual is not None
        after, after_narrow = projection(normed)
        _Region.keep(ctx, h, normed, rstd, narrow, after_narrow)
        return h, after, after_narrow

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_h: Tensor | None, d_base: Tensor, d_narrow: Tensor | None) -> Gradients:
        h, normed, rstd, narrow, after_narrow = ctx.saved_tensors
        after: Pair | None = ctx.projection.pair
        d_A = after.a_gradients(d_narrow, normed) if after and d_narrow is not None else []
        if ctx.pair is None and not any(ctx.needs_input_grad[4:7]):  # the first block, over frozen embeddings
            return None, None, None, None, None, None, None, *d_A
        d_normed = ctx.projection.input_gradient(d_base)
        low_rank = (d_narrow, after_narrow, after.A) if after else (None, None, None)
        d = norm_backward(d_normed, *low_rank, d_h, h, rstd, ctx.rule.weight, ctx.rule.offset)
        d_narrow, d_B = Projected(h, narrow, ctx.pair).backward(d)
        return None, None, None, None, d if ctx.has_residual else None, d, d_narrow, *d_B, *d_A


class _AddNorm(_Region):
    @staticmethod
    def forward(
        ctx: Any,
        rule: Norm,
        pair: Pair | None,
        residual: Tensor | None,
        base: Tensor,
        narrow: Tensor | None,
        *_masters: Tensor,
    ) -> Tensor:
        delta = Projected(base, narrow, pair)
        h, normed, rstd = add_norm(residual, base, *delta.low_rank, rule.weight, rule.eps, rule.offset)
        ctx.rule, ctx.pair, ctx.has_residual = rule, pair, residual is not None
        _Region.keep(ctx, h, rstd, narrow)
        return cast(Tensor, normed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_normed: Tensor) -> Gradients:
        h, rstd, narrow = ctx.saved_tensors
        d = norm_backward(d_normed, None, None, None, None, h, rstd, ctx.rule.weight, ctx.rule.offset)
        d_narrow, d_B = Projected(h, narrow, ctx.pair).backward(d)
        return None, None, d if ctx.has_residual else None, d, d_narrow, *d_B


class _RotatedHeads(_Region):
    @staticmethod
    def forward(
        ctx: Any,
        heads: Heads,
        cos: Tensor,
        sin: Tensor,
        pair: Pair | None,
        base: Tensor,
        narrow: Tensor | None,
        *_masters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv = Projected(base, narrow, pair)
        ctx.heads, ctx.cos, ctx.sin, ctx.pair = heads, cos, sin, pair
        _Region.keep(ctx, base if heads.q_norm is not None else None, narrow)
        norms = heads.q_norm, heads.k_norm, heads.eps, heads.offset
        q, k, v = split_rope(base, *qkv.low_rank, qkv.parts, cos, sin, heads.num_heads, heads.num_kv_heads, *norms)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> Gradients:
        base, narrow = ctx.saved_tensors
        heads, qkv = ctx.heads, Projected(base, narrow, ctx.pair)
        again: tuple[Any, ...] = ()
        if base is not None:  # the heads are normalized once more
            again = (base, *qkv.low_rank, qkv.parts, heads.q_norm, heads.k_norm, heads.eps, heads.offset)
        d = split_rope_backward(d_q, d_k, d_v, ctx.cos, ctx.sin, *again)
        d_narrow, d_B = qkv.backward(d)
        return None, None, None, None, d, d_narrow, *d_B


class _Project(_Region):
    @staticmethod
    def forward(
        ctx: Any, projection: Projection, replay: bool, x: Tensor, *_masters: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        ctx.projection = projection
        _Region.keep(ctx, x)
        return projection(x, replay=replay)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_base: Tensor, d_narrow: Tensor | None) -> Gradients:
        (x,) = ctx.saved_tensors
        pair: Pair | None = ctx.projection.pair
        d_x = ctx.projection.input_gradient(d_base)
        if pair is None or d_narrow is None:
            return None, None, d_x
        return None, None, d_x.addmm_(d_narrow, pair.A), *pair.a_gradients(d_narrow, x)


class _GluProject(_Region):
    @staticmethod
    def forward(
        ctx: Any,
        activation: str,
        projection: Projection,
        replay: bool,
        pair: Pair | None,
        base: Tensor,
        narrow: Tensor | None,
        *_masters: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        gate_up = Projected(base, narrow, pair)
        ctx.activation, ctx.projection, ctx.pair = activation, projection, pair
        _Region.keep(ctx, base, narrow)
        return projection(glu(base, *gate_up.low_rank, gate_up.parts, activation), replay=replay)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_base: Tensor, d_narrow: Tensor | None) -> Gradients:
        base, narrow = ctx.saved_tensors
        gate_up = Projected(base, narrow, ctx.pair)
        after: Pair | None = ctx.projection.pair
        A = after.A if after else None
        act = ctx.projection.input_gradient(d_base)
        glu_backward_(act, d_narrow, A, base, *gate_up.low_rank, gate_up.parts, ctx.activation)
        d_A = after.a_gradients(d_narrow, act) if after and d_narrow is not None else []
        d_narrow, d_B = gate_up.backward(base)  # which is its gradient now
        return None, None, None, None, base, d_narrow, *d_B, *d_A


# The class attribute has no type of its own in PyTorch.
_add_norm_project: Callable[..., Any] = _AddNormProject.apply
_add_norm: Callable[..., Any] = _AddNorm.apply
_rotated_heads: Callable[..., Any] = _RotatedHeads.apply
_project: Callable[..., Any] = _Project.apply
_glu_project: Callable[..., Any] = _GluProject.apply
