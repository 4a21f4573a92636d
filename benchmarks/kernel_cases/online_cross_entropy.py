"""Cross-entropy over one chunk of a head in host memory, and its end, at Llama 8B and, capped, Gemma 2 9B.

As chunks are after the first: the target's word is in another, and the largest logit was before, so that neither the
head nor the gradient is read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernel_cases import KernelBenchmark, randn
from nybble.ops.head_chunks import CHUNK_BYTES, ChunkSizes
from nybble.ops.online_cross_entropy import online_cross_entropy_, online_cross_entropy_end

# Tokens, words, values of a hidden state, cap.
SIZES = ((2048, 128256, 4096, None), (8192, 128256, 4096, None), (8192, 256000, 3584, 30.0))
_VALUE_BYTES = 2


def cases() -> list[KernelBenchmark]:
    return [case for size in SIZES for case in _cases(*size)]


def _cases(tokens: int, vocabulary: int, hidden: int, softcap: float | None) -> list[KernelBenchmark]:
    a_row = 2 * hidden * _VALUE_BYTES  # of the head, in two slots
    sizes = ChunkSizes.within(CHUNK_BYTES, tokens, vocabulary, hidden, value_bytes=_VALUE_BYTES, bytes_a_row=a_row)
    rows, columns = sizes.tokens, sizes.vocabulary

    def chunk(device: torch.device, *, with_gradient: bool) -> tuple[Any, ...]:
        targets = torch.randint(columns, vocabulary, (rows,), device=device)
        gradient = randn(device, rows, hidden, dtype=torch.float32) if with_gradient else None
        target_rows = randn(device, rows, hidden) if with_gradient else None
        held = state(device), gradient, target_rows
        return randn(device, rows, columns), targets, 0, randn(device, columns, hidden), *held, 1.0, softcap

    def state(device: torch.device) -> Tensor:
        """A maximum above all logits, the sum of the others, and the target's logit."""
        return torch.tensor([[20.0], [100.0], [1.0]], device=device).repeat(1, rows)

    def end(device: torch.device) -> tuple[Any, ...]:
        targets = torch.randint(vocabulary, (rows,), device=device)
        gradient, target_rows = randn(device, rows, hidden, dtype=torch.float32), randn(device, rows, hidden)
        return state(device), targets, gradient, target_rows, torch.empty_like(target_rows), 1.0, softcap

    logits, a_token = rows * columns * _VALUE_BYTES, rows * (8 + 2 * 3 * 4)  # target, state
    kind, shape = ", capped" * (softcap is not None), f"{rows} x {columns}"
    return [
        KernelBenchmark(
            online_cross_entropy_,
            f"online_cross_entropy_{kind}",
            shape,
            lambda device: chunk(device, with_gradient=True),
            num_bytes=2 * logits + a_token,
        ),
        KernelBenchmark(
            online_cross_entropy_,
            f"online_cross_entropy_, loss{kind}",
            shape,
            lambda device: chunk(device, with_gradient=False),
            num_bytes=logits + a_token,
        ),
        KernelBenchmark(online_cross_entropy_end, f"online_cross_entropy_end{kind}", f"{rows} x {hidden}", end),
    ]
