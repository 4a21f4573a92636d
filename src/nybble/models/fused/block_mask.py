"""Which blocks of tokens see which, for FlexAttention, without ever holding a value a pair of tokens.

PyTorch's own `create_block_mask` makes all of the mask first: 1 GiB at 32,768 tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

_SIZE = 128  # tokens of a block, FlexAttention's own


def causal_block_mask(seq_len: int, *, window: int | None, samples: Tensor | None, device: torch.device) -> BlockMask:
    """Each token sees those before it, of the last `window`, and of its own sample.

    samples (batch, seq_len): the number of each token's sample, which never decreases along a row.
    """

    def seen(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = query >= key
        if window is not None:
            allowed = allowed & (query - key < window)
        return allowed if samples is None else allowed & (samples[batch, query] == samples[batch, key])

    first = torch.arange(0, seq_len, _SIZE, device=device)
    last = (first + _SIZE - 1).clamp(max=seq_len - 1)
    whole = first + _SIZE <= seq_len
    # Rows are blocks of queries and columns blocks of keys: whether any pair sees each other, and whether all do.
    some = first[None, :] <= last[:, None]
    every = (last[None, :] <= first[:, None]) & whole[:, None] & whole[None, :]
    if window is not None:
        some = some & (first[:, None] - last[None, :] < window)
        every = every & (last[:, None] - first[None, :] < window)
    some, every = some[None, None], every[None, None]
    if samples is not None:
        at_first, at_last = samples[:, first], samples[:, last]
        some = some & (at_last[:, None, None, :] >= at_first[:, None, :, None])
        every = every & (at_first[:, None, None, :] == at_last[:, None, :, None])
    return BlockMask.from_kv_blocks(
        *_listed(some & ~every), *_listed(every), BLOCK_SIZE=_SIZE, mask_mod=seen, seq_lengths=(seq_len, seq_len)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which, first."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int(), order.int()
