"""Cross-entropy in place over chunks of rows, at the vocabularies of SmolLM2, Llama 3, Gemma 3 and, capped, Gemma 2."""

from __future__ import annotations

from typing import Any

import torch

from kernel_cases import KernelBenchmark, randn
from nybble.ops.cross_entropy import cross_entropy_

SIZES = ((4096, 49152, None), (1024, 128256, None), (4096, 128256, None), (1024, 262144, None), (1024, 256000, 30.0))


def cases() -> list[KernelBenchmark]:
    return [_case(*size) for size in SIZES]


def _case(rows: int, vocabulary: int, softcap: float | None) -> KernelBenchmark:
    def arguments(device: torch.device) -> tuple[Any, ...]:
        targets = torch.randint(vocabulary, (rows,), device=device)
        return randn(device, rows, vocabulary), targets, 1.0, softcap

    name = "cross_entropy_" if softcap is None else "cross_entropy_, capped"
    return KernelBenchmark(cross_entropy_, name, f"{rows} x {vocabulary}", arguments, mutated=(0,))
