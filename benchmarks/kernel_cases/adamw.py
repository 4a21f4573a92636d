"""AdamW over the parameters of a LoRA of rank 16 on all linear layers of Llama 8B, and over one layer of that model."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from kernel_cases import KernelBenchmark, randn
from nybble.ops.adamw import BLOCK_SIZE, adamw_, adamw_8bit_

OPTIONS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


def cases() -> list[KernelBenchmark]:
    sizes = [(41_943_040, torch.float32), (41_943_040, torch.bfloat16), (218_112_000, torch.bfloat16)]
    return [_case(numel, dtype, bits) for numel, dtype in sizes for bits in (32, 8)]


def _case(numel: int, dtype: torch.dtype, bits: int) -> KernelBenchmark:
    of_bits = {32: (adamw_, "adamw_", _moments), 8: (adamw_8bit_, "adamw_8bit_", _moments_of_8_bits)}
    op, name, moments = of_bits[bits]

    def arguments(device: torch.device) -> tuple[Any, ...]:
        scalar = functools.partial(torch.tensor, device=device)
        values = (randn(device, numel, dtype=dtype) for _ in range(2))
        return *values, *moments(numel, device), scalar(1e-4), scalar(3.0), scalar(0.5)

    mutated = (0, *range(2, 4 if bits == 32 else 6))
    return KernelBenchmark(op, f"{name} {str(dtype).removeprefix('torch.')}", f"{numel}", arguments, OPTIONS, mutated)


def _moments(numel: int, device: torch.device) -> list[Tensor]:
    return [randn(device, numel, dtype=torch.float32).mul_(1e-3).abs_() for _ in range(2)]


def _moments_of_8_bits(numel: int, device: torch.device) -> list[Tensor]:
    """Codes as those of normally distributed moments."""
    codes = (randn(device, numel).mul_(40).add_(160).clamp_(1, 255).to(torch.uint8) for _ in range(2))
    scales = (torch.full((numel // BLOCK_SIZE,), 1e-3, device=device) for _ in range(2))
    return [tensor for pair in zip(codes, scales, strict=True) for tensor in pair]
