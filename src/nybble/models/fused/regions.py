"""The regions of a block, each one node of the autograd graph: from one matrix product to the next.

A region takes the base output and `narrow` of a projection, whose low-rank product it adds on the way, does what the
model does with the sum, and feeds the next projection. In backward it is the other way round. The gradient that comes
back to `base` is that of the sum, so a region has all trained tensors of the projection that it feeds as inputs, and
`narrow` has no gradient of its own.

Legend: tokens = batch * seq_len; hidden; r = rank; base, narrow: see `nybble.models.fused.projection`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nybble.models.fused.matrix import Rows8
from nybble.models.fused.projection import Pair, Projection
from nybble.ops.glu import glu, glu_backward_
from nybble.ops.norm import add_norm, norm, norm_again, norm_backward
from nybble.ops.norm_fp8 import add_norm_fp8, norm_again_fp8, norm_fp8
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
    def parts(self) -> int:
        return self.pair.parts if self.pair else 1


class Known(NamedTuple):
    """The stream h (tokens, hidden) at a norm, and rstd (tokens,): what the norm of h is quickly made of again."""

    h: Tensor
    rstd: Tensor


class Normed(NamedTuple):
    """The norm of a stream, (tokens, hidden), and the same in e4m3 if it was asked for."""

    x: Tensor
    rows8: Rows8 | None


@dataclass(frozen=True)
class Norm:
    """RMS norm: h / rms(h) * (weight + offset). fp8: in e4m3 too, for the product that reads it."""

    weight: Tensor  # (hidden,)
    eps: float
    offset: float  # 1 in Gemma

    def of_sum(self, residual: Tensor | None, delta: Projected, *, fp8: bool = False) -> tuple[Known, Normed]:
        """h = residual + delta with its rstd, and the norm of h."""
        settings, h = (self.weight, self.eps, self.offset), delta.base
        if residual is None and delta.narrow is None:
            normed, rstd, *rows8 = norm_fp8(h, *settings) if fp8 else norm(h, *settings)
        else:
            summed = residual, delta.base, *delta.low_rank, *settings
            h, normed, rstd, *rows8 = add_norm_fp8(*summed) if fp8 else add_norm(*summed)
        return Known(h, rstd), Normed(normed, Rows8(*rows8) if fp8 else None)

    def again(self, known: Known, *, fp8: bool = False) -> Normed:
        """The norm of a stream that went through `of_sum`, to the bit."""
        arguments = *known, self.weight, self.offset
        if not fp8:
            return Normed(norm_again(*arguments), None)
        normed, *rows8 = norm_again_fp8(*arguments)
        return Normed(normed, Rows8(*rows8))


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
    residual: Tensor | None,
    delta: Projected,
    rule: Norm,
    projection: Projection,
    *,
    known: Known | None = None,
    keep_normed: bool = True,
) -> tuple[Known, Projected]:
    """h = residual + delta, (tokens, hidden), and the projection of its norm. residual None: h = delta.

    known: h, if it was kept from an earlier pass; the values of residual and delta do not count then.
    keep_normed: for the backward pass, or else the norm is made again there.
    """
    h, rstd, base, narrow = _add_norm_project(
        rule, projection, known, keep_normed, delta.pair, delta.narrow, residual, delta.base, *projection.masters
    )
    return Known(h, rstd), Projected(base, narrow, projection.pair)


def add_and_norm(residual: Tensor | None, delta: Projected, rule: Norm) -> Tensor:
    """The norm of residual + delta, (tokens, hidden)."""
    output: Tensor = _add_norm(rule, delta.pair, delta.narrow, residual, delta.base)
    return output


def rotated_heads(qkv: Projected, heads: Heads, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q (tokens, num_heads, head_dim), k and v (tokens, num_kv_heads, head_dim); cos, sin (tokens, rotary_dim)."""
    q, k, v = _rotated_heads(heads, cos, sin, qkv.pair, qkv.narrow, qkv.base)
    return q, k, v


def project(x: Tensor, projection: Projection, *, replay: bool = False) -> Projected:
    """The projection of x (tokens, in). replay: as `Projection` takes it."""
    base, narrow = _project(projection, replay, x, *projection.masters)
    return Projected(base, narrow, projection.pair)


def glu_project(gate_up: Projected, activation: str, projection: Projection, *, replay: bool = False) -> Projected:
    """The projection of act(gate) * up. Its backward pass overwrites gate_up.base, which nobody else may read then."""
    base, narrow = _glu_project(
        activation, projection, replay, gate_up.pair, gate_up.narrow, gate_up.base, *projection.masters
    )
    return Projected(base, narrow, projection.pair)


class _Region(torch.autograd.Function):
    """Gradients that are None stay None: an output that nobody used."""

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
        known: Known | None,
        keep_normed: bool,
        pair: Pair | None,
        narrow: Tensor | None,
        residual: Tensor | None,
        base: Tensor,
        *_masters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        fp8 = projection.matrix.reads_fp8
        if known is None:
            known, (normed, rows8) = rule.of_sum(residual, Projected(base, narrow, pair), fp8=fp8)
        else:
            normed, rows8 = rule.again(known, fp8=fp8)
        after, after_narrow = projection(normed, rows8)
        ctx.rule, ctx.projection, ctx.has_residual = rule, projection, residual is not None
        _Region.keep(ctx, *known, normed if keep_normed and projection.pair else None, after_narrow)
        ctx.mark_non_differentiable(known.rstd, *present(after_narrow))
        return *known, after, after_narrow

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_h: Tensor | None, _d_rstd: None, d: Tensor, _d_narrow: None) -> Gradients:
        h, rstd, normed, narrow = ctx.saved_tensors
        rule, projection = ctx.rule, ctx.projection
        d_narrow, d_B = projection.b_gradients(d, narrow)
        if d_narrow is not None and normed is None:
            normed = rule.again(Known(h, rstd)).x
        d_A = projection.a_gradients(d_narrow, normed)
        if not any(ctx.needs_input_grad[6:8]):  # the first block, over frozen embeddings
            return *8 * (None,), *d_A, *d_B
        low_rank = (d_narrow, narrow, projection.pair.A) if projection.pair else (None, None, None)
        d = norm_backward(projection.input_gradient(d), *low_rank, d_h, h, rstd, rule.weight, rule.offset)
        return *6 * (None,), d if ctx.has_residual else None, d, *d_A, *d_B


class _AddNorm(_Region):
    @staticmethod
    def forward(
        ctx: Any, rule: Norm, pair: Pair | None, narrow: Tensor | None, residual: Tensor | None, base: Tensor
    ) -> Tensor:
        known, normed = rule.of_sum(residual, Projected(base, narrow, pair))
        ctx.rule, ctx.has_residual = rule, residual is not None
        _Region.keep(ctx, *known)
        return normed.x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_normed: Tensor) -> Gradients:
        h, rstd = ctx.saved_tensors
        d = norm_backward(d_normed, None, None, None, None, h, rstd, ctx.rule.weight, ctx.rule.offset)
        return None, None, None, d if ctx.has_residual else None, d


class _RotatedHeads(_Region):
    @staticmethod
    def forward(
        ctx: Any, heads: Heads, cos: Tensor, sin: Tensor, pair: Pair | None, narrow: Tensor | None, base: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv = Projected(base, narrow, pair)
        ctx.heads, ctx.cos, ctx.sin, ctx.pair = heads, cos, sin, pair
        _Region.keep(ctx, *((base, narrow) if heads.q_norm is not None else (None, None)))
        norms = heads.q_norm, heads.k_norm, heads.eps, heads.offset
        q, k, v = split_rope(base, *qkv.low_rank, qkv.parts, cos, sin, heads.num_heads, heads.num_kv_heads, *norms)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> Gradients:
        base, narrow = ctx.saved_tensors
        heads, again = ctx.heads, cast(tuple[Any, ...], ())
        if base is not None:  # the heads are normalized once more
            qkv = Projected(base, narrow, ctx.pair)
            again = (base, *qkv.low_rank, qkv.parts, heads.q_norm, heads.k_norm, heads.eps, heads.offset)
        return *5 * (None,), split_rope_backward(d_q, d_k, d_v, ctx.cos, ctx.sin, *again)


class _Project(_Region):
    @staticmethod
    def forward(
        ctx: Any, projection: Projection, replay: bool, x: Tensor, *_masters: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        base, narrow = projection(x, replay=replay)
        ctx.projection = projection
        _Region.keep(ctx, x if projection.pair else None, narrow)
        ctx.mark_non_differentiable(*present(narrow))
        return base, narrow

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor, _d_narrow: None) -> Gradients:
        x, narrow = ctx.saved_tensors
        projection: Projection = ctx.projection
        d_narrow, d_B = projection.b_gradients(d, narrow)
        d_A = projection.a_gradients(d_narrow, x)
        d_x = projection.input_gradient(d)
        if projection.pair is not None and d_narrow is not None:
            d_x.addmm_(d_narrow, projection.pair.A)
        return None, None, d_x, *d_A, *d_B


class _GluProject(_Region):
    @staticmethod
    def forward(
        ctx: Any,
        activation: str,
        projection: Projection,
        replay: bool,
        pair: Pair | None,
        narrow: Tensor | None,
        base: Tensor,
        *_masters: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        gate_up = Projected(base, narrow, pair)
        after, after_narrow = projection(glu(base, *gate_up.low_rank, gate_up.parts, activation), replay=replay)
        ctx.activation, ctx.projection, ctx.pair = activation, projection, pair
        _Region.keep(ctx, base, narrow, after_narrow)
        ctx.mark_non_differentiable(*present(after_narrow))
        return after, after_narrow

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor, _d_narrow: None) -> Gradients:
        base, narrow, after_narrow = ctx.saved_tensors
        gate_up, projection = Projected(base, narrow, ctx.pair), ctx.projection
        d_narrow, d_B = projection.b_gradients(d, after_narrow)
        A = projection.pair.A if projection.pair else None
        act = projection.input_gradient(d)
        glu_backward_(act, d_narrow, A, base, *gate_up.low_rank, gate_up.parts, ctx.activation)
        d_A = projection.a_gradients(d_narrow, act)
        return *5 * (None,), base, *d_A, *d_B  # base is its gradient now


def present(tensor: Tensor | None) -> tuple[Tensor, ...]:
    """It, or none."""
    return () if tensor is None else (tensor,)


# The class attribute has no type of its own in PyTorch.
_add_norm_project: Callable[..., Any] = _AddNormProject.apply
_add_norm: Callable[..., Any] = _AddNorm.apply
_rotated_heads: Callable[..., Any] = _RotatedHeads.apply
_project: Callable[..., Any] = _Project.apply
_glu_project: Callable[..., Any] = _GluProject.apply
