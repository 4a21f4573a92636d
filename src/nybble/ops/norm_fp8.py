"""RMS norm whose rows go into a product in fp8: `nybble.ops.norm`, and its rows in e4m3 from the same pass.

The bytes are those that `fp8_quantize_rows` gives for `normed`, which is wanted too: adapters read it. A pass of its
own would read it once more, 8 KB a token twice a layer of 8B.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nybble.ops import triton
from nybble.ops.fp8 import fp8_quantize_rows
from nybble.ops.norm import add_norm, norm, norm_again


@torch.library.custom_op("nybble::add_norm_fp8", mutates_args=())
def add_norm_fp8(
    residual: Tensor | None,
    delta: Tensor,
    narrow: Tensor | None,
    B: Tensor | None,
    scaling: float,
    weight: Tensor,
    eps: float,
    offset: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute h, normed and rstd as `add_norm` does, and of normed e4m3 (tokens, hidden) and scale (tokens, 1)."""
    h, normed, rstd = add_norm(residual, delta, narrow, B, scaling, weight, eps, offset)
    return h, normed, rstd, *fp8_quantize_rows(normed, None)


@add_norm_fp8.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    h, normed, rstd = add_norm(*arguments)
    return h, normed, rstd, *fp8_quantize_rows(normed, None)


@torch.library.custom_op("nybble::norm_fp8", mutates_args=())
def norm_fp8(h: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute normed and rstd of h (tokens, hidden) as `norm` does, and e4m3 and scale as `add_norm_fp8`."""
    normed, rstd = norm(h, weight, eps, offset)
    return normed, rstd, *fp8_quantize_rows(normed, None)


@norm_fp8.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    normed, rstd = norm(*arguments)
    return normed, rstd, *fp8_quantize_rows(normed, None)


@torch.library.custom_op("nybble::norm_again_fp8", mutates_args=())
def norm_again_fp8(h: Tensor, rstd: Tensor, weight: Tensor, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute normed, e4m3 and scale from the rstd that `norm_fp8` or `add_norm_fp8` gave, to the same bits."""
    normed = norm_again(h, rstd, weight, offset)
    return normed, *fp8_quantize_rows(normed, None)


@norm_again_fp8.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    normed = norm_again(*arguments)
    return normed, *fp8_quantize_rows(normed, None)


if triton.available():

    @add_norm_fp8.register_kernel("cuda")
    def _(*arguments: Any) -> tuple[Tensor, ...]:
        from nybble.ops.triton import norm as kernels

        return kernels.add_norm_fp8(*arguments)

    @norm_fp8.register_kernel("cuda")
    def _(*arguments: Any) -> tuple[Tensor, ...]:
        from nybble.ops.triton import norm as kernels

        return kernels.norm_fp8(*arguments)

    @norm_again_fp8.register_kernel("cuda")
    def _(*arguments: Any) -> tuple[Tensor, ...]:
        from nybble.ops.triton import norm as kernels

        return kernels.norm_again_fp8(*arguments)
