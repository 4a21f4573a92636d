"""RMS norm with residual sum and low-rank product, at the widths of SmolLM2-135M, Gemma 3 12B, Llama 8B and 70B."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kernel_cases import KernelBenchmark, randn
from nybble.ops.norm import add_norm, norm, norm_again, norm_backward
from nybble.ops.norm_fp8 import add_norm_fp8, norm_again_fp8, norm_fp8

TOKENS = 8192
SCALING, EPS, OFFSET = 2.0, 1e-5, 0.0


def cases() -> list[KernelBenchmark]:
    return [case for hidden in (576, 3840, 4096, 8192) for rank in (0, 16, 64) for case in _cases(hidden, rank)]


def _cases(hidden: int, rank: int) -> list[KernelBenchmark]:
    def adding_norm(device: torch.device) -> tuple[Any, ...]:
        narrow, B = (randn(device, n, rank) if rank else None for n in (TOKENS, hidden))
        added = randn(device, TOKENS, hidden), randn(device, TOKENS, hidden), narrow, B, SCALING
        return *added, randn(device, hidden), EPS, OFFSET

    def norming(device: torch.device) -> tuple[Any, ...]:
        return randn(device, TOKENS, hidden), randn(device, hidden), EPS, OFFSET

    def again(device: torch.device) -> tuple[Any, ...]:
        rstd = randn(device, TOKENS, dtype=torch.float32).abs()
        return randn(device, TOKENS, hidden), rstd, randn(device, hidden), OFFSET

    def backward(device: torch.device) -> tuple[Any, ...]:
        d_narrow, narrow = (randn(device, TOKENS, 3 * rank) if rank else None for _ in range(2))
        A = randn(device, 3 * rank, hidden) if rank else None
        wide = [randn(device, TOKENS, hidden) for _ in range(3)]
        rstd = randn(device, TOKENS, dtype=torch.float32).abs()
        return wide[0], d_narrow, narrow, A, wide[1], wide[2], rstd, randn(device, hidden), OFFSET

    def case(op: Callable[..., Any], name: str, arguments: Callable[..., Any], columns: int) -> KernelBenchmark:
        return KernelBenchmark(op, f"{name}, r {columns}" if columns else name, f"{TOKENS} x {hidden}", arguments)

    always = [
        case(add_norm, "add_norm", adding_norm, rank),
        case(norm_backward, "norm_backward", backward, 3 * rank),  # q, k and v
    ]
    if torch.cuda.get_device_capability() >= (8, 9):
        always += [case(add_norm_fp8, "add_norm_fp8", adding_norm, rank)]
    if rank:
        return always
    alone = [case(norm, "norm", norming, 0), case(norm_again, "norm_again", again, 0)]
    if torch.cuda.get_device_capability() >= (8, 9):
        alone += [case(norm_fp8, "norm_fp8", norming, 0), case(norm_again_fp8, "norm_again_fp8", again, 0)]
    return [*always, *alone]
