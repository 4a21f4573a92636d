"""8-bit floating point (e4m3, arXiv 2209.05433) with a scale a row, for matrix products of twice the speed of bf16.

A matrix is stored as e4m3 and fp32 scales, matrix ~ e4m3 * scale; the largest magnitude of a row becomes 448, the
largest of e4m3. The product wants both operands with the summed dimension contiguous, so a weight has two layouts:
(out, in) for y = x W^T and, transposed, (in, out) for dx = dy W. Its scales belong to the rows of W in both: in the
second they lie along the summed dimension, where no product can apply them, so dy takes them as `column_scale`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from nybble.ops import triton
from nybble.ops.nf4 import absmax_dequantize, nf4_dequantize

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
# Below this the reciprocal of a scale would be infinite in fp32: such a row counts as zeros.
SMALLEST_ABSMAX = E4M3_MAX * 2.0**-126


def scale_of(absmax: Tensor) -> Tensor:
    """The fp32 scale of rows whose largest magnitude is `absmax`; 1 for rows of zeros. NaN stays."""
    absmax = absmax.float()
    return (absmax / E4M3_MAX).masked_fill_(absmax < SMALLEST_ABSMAX, 1.0)


@torch.library.custom_op("nybble::fp8_quantize_rows", mutates_args=())
def fp8_quantize_rows(x: Tensor, column_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantize x (rows, columns), multiplied by column_scale (columns,) if given: e4m3 of its shape, scale (rows, 1).

    A value is multiplied in fp32 by the reciprocal of its row's scale, and rounded once.
    """
    wide = x.float() if column_scale is None else x.float() * column_scale
    scale = scale_of(wide.abs().amax(1, keepdim=True))
    return (wide * scale.reciprocal()).to(E4M3), scale


@fp8_quantize_rows.register_fake
def _(x: Tensor, column_scale: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@torch.library.custom_op("nybble::fp8_quantize_weight_into", mutates_args=("values", "row_scale"))
def fp8_quantize_weight_into(values: Tensor, row_scale: Tensor, weight: Tensor) -> None:
    """Quantize weight (out, in) into values, e4m3 (out, in), and row_scale (out,), which are there already.

    values is contiguous, for instance some rows of a larger matrix, or the transpose of some of its columns.
    """
    quantized, scale = fp8_quantize_rows(weight, None)
    values.copy_(quantized)
    row_scale.copy_(scale.view(-1))


@fp8_quantize_weight_into.register_fake
def _(values: Tensor, row_scale: Tensor, weight: Tensor) -> None:
    pass


@torch.library.custom_op("nybble::nf4_dequantize_fp8_into", mutates_args=("values", "row_scale"))
def nf4_dequantize_fp8_into(
    values: Tensor,
    row_scale: Tensor,
    codes: Tensor,
    absmax: Tensor,
    group_absmax: Tensor | None,
    offset: Tensor | None,
    *,
    block_size: int,
    group_size: int,
) -> None:
    """Rebuild an NF4 weight in e4m3: as `fp8_quantize_weight_into`, without the 16-bit weight between.

    row_scale (out,) comes from the largest absmax of a row's blocks. A value is level * (absmax / row_scale), in fp32,
    rounded once: to e4m3 that costs 2.3 %, beside the 9 % of NF4. Stored tensors: as in `nf4_dequantize`.
    Raises ValueError if rows are not made of whole blocks.
    """
    _check_whole_blocks(values, block_size)
    if group_absmax is not None:
        assert offset is not None
        absmax = absmax_dequantize(absmax, group_absmax, offset, group_size)
    peaks = absmax.view(len(values), -1)
    row_scale.copy_(scale_of(peaks.abs().amax(1)))  # a second-level code may round a small absmax to below zero
    unit = (peaks / row_scale[:, None]).view(-1)
    sizes = {"block_size": block_size, "group_size": group_size}
    values.copy_(nf4_dequantize(codes, unit, None, None, **sizes, shape=values.shape, dtype=E4M3))


@nf4_dequantize_fp8_into.register_fake
def _(values: Tensor, *stored: Tensor | None, block_size: int, group_size: int) -> None:
    pass


@torch.library.custom_op("nybble::fp8_matmul", mutates_args=())
def fp8_matmul(a: Tensor, a_scale: Tensor, b_transposed: Tensor, b_scale: Tensor, fast: bool = False) -> Tensor:  # noqa: ARG001
    """bf16 (rows, n): (a * a_scale) @ (b_transposed^T * b_scale), summed in fp32.

    a e4m3 (rows, k), a_scale fp32 (rows, 1), b_transposed e4m3 (n, k), b_scale fp32 (1, n); on a GPU n and k are
    multiples of 16 and its compute capability is 8.9 or more. fast: Hopper's tensor cores may keep the running sum in
    fewer bits than fp32 has, 14 of the mantissa, which takes 10 % less time.
    """
    return (a.float() @ b_transposed.float().t() * a_scale * b_scale).bfloat16()


@fp8_matmul.register_fake
def _(a: Tensor, a_scale: Tensor, b_transposed: Tensor, b_scale: Tensor, fast: bool = False) -> Tensor:  # noqa: ARG001
    return a.new_empty(a.shape[0], b_transposed.shape[0], dtype=torch.bfloat16)


@fp8_matmul.register_kernel("cuda")
def _(a: Tensor, a_scale: Tensor, b_transposed: Tensor, b_scale: Tensor, fast: bool = False) -> Tensor:
    scales = (a_scale, ScalingType.RowWise, b_scale, ScalingType.RowWise)
    return scaled_mm(a, b_transposed.t(), *scales, output_dtype=torch.bfloat16, use_fast_accum=fast)


if triton.available():

    @fp8_quantize_rows.register_kernel("cuda")
    def _(x: Tensor, column_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        from nybble.ops.triton import fp8 as kernels

        return kernels.quantize_rows(x, column_scale)

    @fp8_quantize_weight_into.register_kernel("cuda")
    def _(values: Tensor, row_scale: Tensor, weight: Tensor) -> None:
        from nybble.ops.triton import fp8 as kernels

        kernels.quantize_weight(values, row_scale, weight)

    @nf4_dequantize_fp8_into.register_kernel("cuda")
    def _(values: Tensor, *stored: Any, block_size: int, group_size: int) -> None:
        from nybble.ops.triton import fp8 as kernels

        _check_whole_blocks(values, block_size)
        kernels.nf4_dequantize(values, *stored, block_size=block_size, group_size=group_size)


def _check_whole_blocks(weight: Tensor, block_size: int) -> None:
    if weight.shape[1] % block_size:
        shape = tuple(weight.shape)
        raise ValueError(f"fp8 needs rows of whole blocks of {block_size} values, which a weight of {shape} has not")
