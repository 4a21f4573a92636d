"""AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2) over flat tensors, in place.

Learning rate, number of the step and factor of the gradient are read on the device, so that a CUDA graph can replay an
update: the host neither knows them nor waits for them. Where the factor is not finite, nothing changes.

Moments are fp32, or 8 bits a value in blocks of 256, each with its absmax in fp32 (Dettmers et al., arXiv 2110.02861).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from nybble.ops import triton
from nybble.ops.nf4 import absmax_levels, midpoints
from nybble.ops.wide import wide_dtype

BLOCK_SIZE = 256

# The code of zero in the map of the first moment; in that of the second it is 0.
ZERO_CODE = 127


def first_moment_levels(device: torch.device) -> Tensor:
    """The signed dynamic map, (256,) fp32, sorted."""
    return absmax_levels(device)


@functools.cache
def second_moment_levels(device: torch.device) -> Tensor:
    """The unsigned dynamic map, (256,) fp32, sorted: what the sign leaves free doubles the values of each decade."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i + 1) + 1, dtype=torch.float32, device="cpu")
        values += ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@torch.library.custom_op("nybble::adamw_", mutates_args=("parameter", "exp_avg", "exp_avg_sq"))
def adamw_(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: Tensor,
    step: Tensor,
    gradient_scale: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Update number `step` (from 1) of `parameter` along `gradient_scale * gradient`, and both moments.

    All arithmetic is in the dtype of the moments, fp32 (fp64 for fp64 parameters); the parameter is rounded once.
    """
    if gradient_scale.isfinite():
        scaled = gradient.to(exp_avg.dtype) * gradient_scale
        _update_(parameter, scaled, exp_avg, exp_avg_sq, lr, step, beta1, beta2, eps, weight_decay)


@torch.library.custom_op(
    "nybble::adamw_8bit_",
    mutates_args=("parameter", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale"),
)
def adamw_8bit_(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_scale: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_scale: Tensor,
    lr: Tensor,
    step: Tensor,
    gradient_scale: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """`adamw_` with moments as codes, uint8 (numel,), and scales, fp32 (numel / 256,); numel is a multiple of 256.

    The parameter is updated by the moments as they are before they are rounded to 8 bits again.
    """
    if gradient_scale.isfinite():
        dtype = wide_dtype(parameter)
        scaled = gradient.to(dtype) * gradient_scale
        m = dequantize_moment(exp_avg, exp_avg_scale, first_moment_levels(parameter.device)).to(dtype)
        v = dequantize_moment(exp_avg_sq, exp_avg_sq_scale, second_moment_levels(parameter.device)).to(dtype)
        _update_(parameter, scaled, m, v, lr, step, beta1, beta2, eps, weight_decay)
        _quantize_moment(m, exp_avg, exp_avg_scale, first_moment_levels(parameter.device))
        _quantize_moment(v, exp_avg_sq, exp_avg_sq_scale, second_moment_levels(parameter.device))
        # The smallest level instead of zero: m / eps would be a step of any length.
        exp_avg_sq.clamp_(min=v > 0)


@adamw_.register_fake
def _(*tensors: Tensor, **options: float) -> None:
    pass


@adamw_8bit_.register_fake
def _(*tensors: Tensor, **options: float) -> None:
    pass


if triton.available():

    @adamw_.register_kernel("cuda")
    def _(*tensors: Tensor, **options: Any) -> None:
        from nybble.ops.triton import adamw as kernels

        kernels.adamw_(*tensors, **options)

    @adamw_8bit_.register_kernel("cuda")
    def _(*tensors: Tensor, **options: Any) -> None:
        from nybble.ops.triton import adamw as kernels

        kernels.adamw_8bit_(*tensors, **options)


def dequantize_moment(codes: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """level * scale, fp32, in the shape of `codes`."""
    return (levels[codes.int()].view(-1, BLOCK_SIZE) * scale[:, None]).view(codes.shape)


def _quantize_moment(moment: Tensor, codes: Tensor, scale: Tensor, levels: Tensor) -> None:
    blocks = moment.float().view(-1, BLOCK_SIZE)
    torch.amax(blocks.abs(), 1, out=scale)
    # A block of zeros gives 0 * inf: take 0. A reciprocal that overflows: the value is at most the absmax.
    unit = blocks.mul(scale.reciprocal()[:, None]).nan_to_num_(0.0).clamp_(-1.0, 1.0)
    codes.copy_(torch.bucketize(unit.view(codes.shape), midpoints(levels), out_int32=True))


def _update_(
    parameter: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    lr: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    m.lerp_(gradient, 1 - beta1)
    v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    # In fp64: what is left of 1 - 0.999 in fp32 has lost 4 digits.
    correction1, correction2 = ((1 - beta ** step.double()).to(m.dtype) for beta in (beta1, beta2))
    denominator = v.sqrt().div_(correction2.sqrt()).add_(eps)
    decayed = parameter.to(m.dtype) * (1 - lr * weight_decay)
    parameter.copy_(decayed.sub_(m.div(denominator).mul_(lr / correction1)))
