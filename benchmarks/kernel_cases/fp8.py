"""Quantization to fp8 and products in it, at the widths of Llama 8B."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernel_cases import KernelBenchmark, randn
from nybble.ops.fp8 import E4M3, fp8_matmul, fp8_quantize_rows, fp8_quantize_weight_into, nf4_dequantize_fp8_into
from nybble.ops.nf4 import absmax_quantize, nf4_quantize

TOKENS = 8192
# What enters the linears, unscaled, and the gradients of what leaves them, which take the scales of the weight's rows.
ROWS = ((4096, False), (14336, False), (4096, True), (6144, True), (28672, True))
WEIGHTS = ((14336, 4096), (4096, 14336), (4096, 4096), (1024, 4096))
# tokens x k by k x n: gate and up, down, q with k and v.
PRODUCTS = ((4096, 28672), (28672, 4096), (14336, 4096), (4096, 6144))


def cases() -> list[KernelBenchmark]:
    if torch.cuda.get_device_capability() < (8, 9):
        return []
    weights = [case for shape in WEIGHTS for transposed in (False, True) for case in _weight_cases(shape, transposed)]
    return [*(_rows_case(*rows) for rows in ROWS), *weights, *(_product_case(*sizes) for sizes in PRODUCTS)]


def _rows_case(columns: int, scaled: bool) -> KernelBenchmark:
    def arguments(device: torch.device) -> tuple[Any, ...]:
        return randn(device, TOKENS, columns), torch.rand(columns, device=device) if scaled else None

    name = "fp8_quantize_rows, scaled" if scaled else "fp8_quantize_rows"
    return KernelBenchmark(fp8_quantize_rows, name, f"{TOKENS} x {columns}", arguments)


def _weight_cases(shape: tuple[int, int], transposed: bool) -> list[KernelBenchmark]:
    def empty(device: torch.device) -> tuple[Tensor, Tensor]:
        values = torch.empty(shape[::-1] if transposed else shape, dtype=E4M3, device=device)
        return values.t() if transposed else values, torch.empty(shape[0], device=device)

    def nf4(device: torch.device) -> tuple[Any, ...]:
        codes, absmax = nf4_quantize(randn(device, *shape), 64)
        return *empty(device), codes, *absmax_quantize(absmax, 256)

    def dense(device: torch.device) -> tuple[Any, ...]:
        return *empty(device), randn(device, *shape)

    sizes = {"block_size": 64, "group_size": 256}
    suffix, shown = ", transposed" if transposed else "", f"{shape[0]} x {shape[1]}"
    return [
        KernelBenchmark(nf4_dequantize_fp8_into, f"nf4_dequantize_fp8{suffix}", shown, nf4, sizes),
        KernelBenchmark(fp8_quantize_weight_into, f"fp8_quantize_weight{suffix}", shown, dense),
    ]


def _product_case(k: int, n: int) -> KernelBenchmark:
    def arguments(device: torch.device) -> tuple[Any, ...]:
        a, a_scale = fp8_quantize_rows(randn(device, TOKENS, k), None)
        b, b_scale = fp8_quantize_rows(randn(device, n, k), None)
        return a, a_scale, b, b_scale.view(1, n)

    return KernelBenchmark(fp8_matmul, "fp8_matmul", f"{TOKENS} x {k} x {n}", arguments, flops=2 * TOKENS * k * n)
