"""Rows of the embedding of Llama 8B, on the device and, as a run that keeps it there has them, from host memory."""

from __future__ import annotations

from typing import Any

import torch

from kernel_cases import KernelBenchmark, randn
from nybble.memory.pinned import pinned
from nybble.ops.gather import gather_rows

VOCABULARY, HIDDEN = 128256, 4096
TOKENS = (2048, 8192)
_VALUE_BYTES, _INDEX_BYTES = 2, 8


def cases() -> list[KernelBenchmark]:
    return [_case(tokens, from_host=from_host) for tokens in TOKENS for from_host in (False, True)]


def _case(tokens: int, *, from_host: bool) -> KernelBenchmark:
    def arguments(device: torch.device) -> tuple[Any, ...]:
        matrix = randn(device, VOCABULARY, HIDDEN)
        if from_host:
            matrix = pinned(matrix.nbytes).view(matrix.dtype).view(matrix.shape).copy_(matrix)
        return matrix, torch.randint(VOCABULARY, (tokens,), device=device)

    rows = tokens * HIDDEN * _VALUE_BYTES
    return KernelBenchmark(
        gather_rows,
        "gather_rows, from the host" if from_host else "gather_rows",
        f"{tokens} of {VOCABULARY} x {HIDDEN}",
        arguments,
        num_bytes=rows if from_host else 2 * rows + tokens * _INDEX_BYTES,
        from_host=from_host,
    )
