"""Causal attention within samples, by the fastest way that this card and PyTorch have for it.

Measured on an H100, forward and backward of 4 x 2048 tokens, 32 heads of 128, 8 of keys and values: cuDNN 261 + 941 us,
FlexAttention 424 + 1,375, FlashAttention 2 475 + 1,518 and its form for packed samples 490 + 1,552 (less the shorter
the samples are, as what lies between samples is not computed).

Legend: tokens = batch * seq_len; samples are the stretches within which tokens see each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from nybble.models.fused.block_mask import causal_block_mask
from nybble.ops.wide import wide_dtype


@dataclass(frozen=True)
class AttentionRule:
    """What a layer's attention does beside being causal: scale, a sliding window of tokens, a cap on scores."""

    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Layout:
    """Where samples lie: rows of one sample each (cu_seqlens None), or samples between the borders cu_seqlens.

    cu_seqlens (batch * samples_a_row + 1,) int32 has a fixed length, and repeats the last border. block_masks: those
    that layers have made so far, by their window.
    """

    batch: int
    seq_len: int
    cu_seqlens: Tensor | None = None
    block_masks: dict[int | None, BlockMask] = field(default_factory=dict)

    @classmethod
    def of(cls, position_ids: Tensor, *, samples_a_row: int) -> Layout:
        """The layout of position_ids (batch, seq_len), which start again where a sample begins, at most so often."""
        batch, seq_len = position_ids.shape
        if samples_a_row == 1:
            return cls(batch, seq_len)
        # Without asking the device how many there are: the samples' first tokens, and then the end, again and again.
        tokens = torch.arange(position_ids.numel(), dtype=torch.int32, device=position_ids.device)
        first = (position_ids == 0).flatten() | (tokens % seq_len == 0)
        borders = torch.where(first, tokens, position_ids.numel()).sort().values
        end = borders.new_full((1,), position_ids.numel())
        return cls(batch, seq_len, torch.cat([borders[: batch * samples_a_row], end]))

    @functools.cached_property
    def samples(self) -> Tensor:
        """The number of each token's sample, (batch, seq_len)."""
        assert self.cu_seqlens is not None
        tokens = torch.arange(self.batch * self.seq_len, dtype=torch.int32, device=self.cu_seqlens.device)
        return torch.bucketize(tokens, self.cu_seqlens, right=True).view(self.batch, self.seq_len)


def attend(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, layout: Layout) -> Tensor:
    """Attention of q (tokens, heads, head_dim) to k, v (tokens, kv_heads, head_dim): (tokens, heads * head_dim)."""
    window = rule.window if rule.window is not None and rule.window < layout.seq_len else None
    rule = AttentionRule(rule.scale, window, rule.softcap)
    how = _choose(q.device, rule, packed=layout.cu_seqlens is not None, head_dim=q.shape[-1], dtype=q.dtype)
    return how(q, k, v, rule, layout).flatten(1)


Way = Callable[[Tensor, Tensor, Tensor, AttentionRule, Layout], Tensor]


def describe(device: torch.device, rule: AttentionRule, *, packed: bool, head_dim: int, dtype: torch.dtype) -> str:
    """Which way is taken, in words."""
    return _NAMES[_choose(device, rule, packed=packed, head_dim=head_dim, dtype=dtype)]


def _choose(device: torch.device, rule: AttentionRule, *, packed: bool, head_dim: int, dtype: torch.dtype) -> Way:
    if device.type != "cuda":
        return _masked
    if rule.softcap is None and rule.window is None and not packed:
        return _causal
    half = dtype in (torch.bfloat16, torch.float16)
    ampere = torch.cuda.get_device_capability(device) >= (8, 0)
    return _packed if rule.softcap is None and half and ampere and head_dim <= 256 else _flexible


def _causal(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, layout: Layout) -> Tensor:
    heads = _by_row(q, k, v, layout)
    ways = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if not torch.are_deterministic_algorithms_enabled():  # cuDNN's backward pass is not
        ways.insert(0, SDPBackend.CUDNN_ATTENTION)
    with sdpa_kernel(ways, set_priority=True):
        output = scaled_dot_product_attention(*heads, is_causal=True, scale=rule.scale, enable_gqa=True)
    return _by_token(output)


def _packed(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, layout: Layout) -> Tensor:
    borders = layout.cu_seqlens
    if borders is None:
        borders = torch.arange(layout.batch + 1, dtype=torch.int32, device=q.device) * layout.seq_len
    back = -1 if rule.window is None else rule.window - 1
    longest = layout.seq_len
    output = varlen_attn(
        q, k, v, borders, borders, longest, longest, scale=rule.scale, window_size=(back, 0), **_SHARED_KEYS
    )
    assert isinstance(output, Tensor)
    return output


def _flexible(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, layout: Layout) -> Tensor:
    cap = rule.softcap

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return score if cap is None else cap * torch.tanh(score / cap)

    if rule.window not in layout.block_masks:
        samples = None if layout.cu_seqlens is None else layout.samples
        mask = causal_block_mask(layout.seq_len, window=rule.window, samples=samples, device=q.device)
        layout.block_masks[rule.window] = mask
    output = _compiled_flex()(
        *_by_row(q, k, v, layout),
        score_mod=capped if cap is not None else None,
        block_mask=layout.block_masks[rule.window],
        scale=rule.scale,
        enable_gqa=True,
    )
    return _by_token(output)


def _masked(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, layout: Layout) -> Tensor:
    """In plain PyTorch, with all scores in memory: the definition, and what a CPU runs."""
    queries, keys, values = _by_row(q, k, v, layout)
    keys, values = (t.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1) for t in (keys, values))
    scores = queries @ keys.mT * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    seen = torch.ones(layout.seq_len, layout.seq_len, dtype=torch.bool, device=q.device).tril_()
    if rule.window is not None:
        seen = seen.triu_(1 - rule.window)
    if layout.cu_seqlens is not None:
        sample = layout.samples
        seen = seen & (sample[:, None, :, None] == sample[:, None, None, :])
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1, dtype=wide_dtype(q))
    return _by_token(weights.to(q.dtype) @ values)


# PyTorch 2.11 takes fewer heads of keys and values as they come; from 2.12 on they must be announced.
_SHARED_KEYS: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}

_NAMES: dict[Way, str] = {
    _causal: "cuDNN or FlashAttention, through PyTorch",
    _packed: "FlashAttention over samples of any length",
    _flexible: "FlexAttention",
    _masked: "plain PyTorch with a mask",
}


def _by_row(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, heads, seq_len, head_dim) each, as views."""
    q, k, v = (heads.view(layout.batch, layout.seq_len, *heads.shape[1:]).transpose(1, 2) for heads in (q, k, v))
    return q, k, v


def _by_token(output: Tensor) -> Tensor:
    """(batch, heads, seq_len, head_dim) -> (tokens, heads, head_dim)."""
    return output.transpose(1, 2).flatten(0, 1)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)
