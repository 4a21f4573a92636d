"""AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2) over flat tensors, in place.

Learning rate, number of the step and factor of the gradient are read on the device, so that a CUDA graph can replay an
update: the host neither knows them nor waits for them. Where the factor is not finite, nothing changes.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    if not gradient_scale.isfinite():
        return
    scaled = gradient.to(exp_avg.dtype) * gradient_scale
    exp_avg.lerp_(scaled, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(scaled, scaled, value=1 - beta2)
    # In fp64: what is left of 1 - 0.999 in fp32 has lost 4 digits.
    correction1, correction2 = ((1 - beta ** step.double()).to(exp_avg.dtype) for beta in (beta1, beta2))
    denominator = exp_avg_sq.sqrt().div_(correction2.sqrt()).add_(eps)
    decayed = parameter.to(exp_avg.dtype) * (1 - lr * weight_decay)
    parameter.copy_(decayed.sub_(exp_avg.div(denominator).mul_(lr / correction1)))


@adamw_.register_fake
def _(*tensors: Tensor, **options: float) -> None:
    pass
