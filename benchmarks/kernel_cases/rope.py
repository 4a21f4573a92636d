"""Splitting and rotation of heads as in SmolLM2-135M, Llama 8B, Qwen3 8B, Phi-4-mini and Gemma 3 12B.

A gradient with norms does not read the values in qkv, though its bytes include them: 6 % at Qwen3, 8 % at Gemma 3.
"""

from __future__ import annotations

from typing import Any

import torch

from kernel_cases import KernelBenchmark, randn
from nybble.ops.rope import split_rope, split_rope_backward

TOKENS = 8192
SCALING, EPS, OFFSET = 2.0, 1e-6, 0.0
# Query heads, heads of keys and of values, their size, how much of it is rotated, whether they are normalized.
MODELS = ((9, 3, 64, 64, False), (32, 8, 128, 128, False), (32, 8, 128, 128, True))
MODELS += ((24, 8, 128, 96, False), (16, 8, 256, 256, True))


def cases() -> list[KernelBenchmark]:
    return [case for model in MODELS for rank in (0, 16, 64) for case in _cases(*model, rank)]


def _cases(
    num_heads: int, num_kv_heads: int, head_dim: int, rotary_dim: int, norm: bool, rank: int
) -> list[KernelBenchmark]:
    counts = num_heads, num_kv_heads, num_kv_heads
    width = sum(counts) * head_dim

    def adapted(device: torch.device) -> tuple[Any, ...]:
        narrow, B = (randn(device, TOKENS, 3 * rank), randn(device, width, rank)) if rank else (None, None)
        return randn(device, TOKENS, width), narrow, B, SCALING, 3

    def angles(device: torch.device) -> list[torch.Tensor]:
        return [randn(device, TOKENS, rotary_dim) for _ in range(2)]

    def norms(device: torch.device) -> tuple[Any, ...]:
        weights = (randn(device, head_dim) if norm else None for _ in range(2))
        return *weights, EPS, OFFSET

    def forward(device: torch.device) -> tuple[Any, ...]:
        return *adapted(device), *angles(device), num_heads, num_kv_heads, *norms(device)

    def backward(device: torch.device) -> tuple[Any, ...]:
        gradients = [randn(device, TOKENS, count, head_dim) for count in counts]
        again = (*adapted(device), *norms(device)) if norm else ()
        return *gradients, *angles(device), *again

    heads = f"{num_heads}+2*{num_kv_heads} of {head_dim}"
    kind = ", norms" if norm else f", {rotary_dim} rotated" if rotary_dim < head_dim else ""
    ranked = f"{kind}, r {rank}" if rank else kind
    made = [KernelBenchmark(split_rope, f"split_rope{ranked}", f"{TOKENS} x {heads}", forward)]
    if norm or not rank:  # without norms the gradient asks for no adapter
        made.append(KernelBenchmark(split_rope_backward, f"rope_backward{ranked}", f"{TOKENS} x {heads}", backward))
    return made
