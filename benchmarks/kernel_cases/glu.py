"""The gated linear unit and its gradient, at the widths of SmolLM2-135M and Llama 8B."""

from __future__ import annotations

from typing import Any

import torch

from kernel_cases import KernelBenchmark, randn
from nybble.ops.glu import glu, glu_backward_

SHAPES = ((8192, 14336), (2048, 14336), (8192, 1536))
SCALING, PARTS, ACTIVATION = 2.0, 2, "silu"


def cases() -> list[KernelBenchmark]:
    return [case for shape in SHAPES for rank in (0, 8, 16, 64) for case in _cases(*shape, rank)]


def _cases(tokens: int, intermediate: int, rank: int) -> list[KernelBenchmark]:
    def forward(device: torch.device) -> tuple[Any, ...]:
        narrow = randn(device, tokens, PARTS * rank) if rank else None
        B = randn(device, PARTS * intermediate, rank) if rank else None
        return randn(device, tokens, PARTS * intermediate), narrow, B, SCALING, PARTS, ACTIVATION

    def backward(device: torch.device) -> tuple[Any, ...]:
        d_narrow = randn(device, tokens, rank) if rank else None
        A = randn(device, rank, intermediate) if rank else None
        return randn(device, tokens, intermediate), d_narrow, A, *forward(device)

    suffix, shape = f", r {rank}" if rank else "", f"{tokens} x {intermediate}"
    return [
        KernelBenchmark(glu, f"glu{suffix}", shape, forward),
        KernelBenchmark(glu_backward_, f"glu_backward_{suffix}", shape, backward, mutated=(0, 3)),
    ]
