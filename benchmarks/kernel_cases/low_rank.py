"""Gradients of low-rank pairs beside those by two GEMMs, at the stacked linears of SmolLM2-135M and Llama 8B."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernel_cases import KernelBenchmark, randn
from nybble.ops.low_rank import a_gradient_, low_rank_backward_

# gate and up; q, k and v; o or down.
STACKS = ([14336, 14336], [4096, 1024, 1024], [4096], [1536, 1536], [576, 192, 192], [576])
SCALING = 2.0


def cases() -> list[KernelBenchmark]:
    stacked = [
        case
        for tokens in (8192, 2048)
        for sizes in STACKS
        for rank in (8, 16, 64)
        for case in _cases(tokens, sizes, rank)
    ]
    return [*stacked, *(_a_case(8192, columns, width) for columns, width in ((32, 4096), (16, 14336), (48, 576)))]


def _cases(tokens: int, sizes: list[int], rank: int) -> list[KernelBenchmark]:
    def arguments(device: torch.device) -> tuple[Any, ...]:
        out = sum(sizes)
        d_B = torch.zeros(out, rank, device=device)
        pair = randn(device, tokens, len(sizes) * rank), randn(device, out, rank)
        return d_B, randn(device, tokens, out), *pair, SCALING, sizes

    shape = f"{tokens} x {'+'.join(map(str, sizes))}"
    return [
        KernelBenchmark(op, f"{name}, r {rank}", shape, arguments, mutated=(0,))
        for op, name in ((low_rank_backward_, "low_rank_backward_"), (two_products, "the same by cuBLAS"))
    ]


def two_products(
    d_B: Tensor, d_output: Tensor, narrow: Tensor, B: Tensor, scaling: float, sizes: list[int]
) -> tuple[Tensor, ...]:
    """Both gradients as autograd computes them, all in 16 bits, and that of B added."""
    parts = zip(d_B.split(sizes), d_output.split(sizes, 1), narrow.split(B.shape[1], 1), B.split(sizes), strict=True)
    results = [(scaling * (out @ b), so_far.add_(scaling * (out.t() @ thin))) for so_far, out, thin, b in parts]
    return tuple(d_narrow for d_narrow, _ in results)


def _a_case(tokens: int, columns: int, width: int) -> KernelBenchmark:
    def arguments(device: torch.device) -> tuple[Any, ...]:
        d_A = torch.zeros(columns, width, device=device)
        return d_A, randn(device, tokens, columns), randn(device, tokens, width)

    return KernelBenchmark(a_gradient_, "a_gradient_", f"{tokens} x {width} by {columns}", arguments, mutated=(0,))
