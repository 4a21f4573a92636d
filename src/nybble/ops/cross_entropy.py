"""Cross-entropy over a vocabulary, whose logits become their gradient where they lie.

Legend: rows = tokens that predict one, or a chunk of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.labels import IGNORED
from nybble.ops import triton
from nybble.ops.wide import wide_dtype


@torch.library.custom_op("nybble::cross_entropy_", mutates_args={"logits"})
def cross_entropy_(logits: Tensor, targets: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Each row's loss, (rows,) fp32, for logits (rows, vocabulary) as the head gave them and targets (rows,) int64.

    The model's logits are z = scale * x, or softcap * tanh(scale * x / softcap) (Gemma 2, arXiv 2408.00118).
    `logits` becomes the gradient of the sum of losses with respect to x. IGNORED targets: loss 0, gradient 0.
    """
    z, slope = capped(logits.to(wide_dtype(logits)), scale, softcap)
    counted = targets != IGNORED
    column = targets.where(counted, 0)[:, None]
    log_probability = z.log_softmax(1)
    losses = -log_probability.gather(1, column).squeeze(1).where(counted, 0.0)
    gradient = log_probability.exp_().scatter_add_(1, column, torch.full_like(column, -1.0, dtype=z.dtype))
    logits.copy_((gradient * slope).where(counted[:, None], 0.0))
    return losses


@cross_entropy_.register_fake
def _(logits: Tensor, targets: Tensor, scale: float, softcap: float | None) -> Tensor:  # noqa: ARG001
    return logits.new_empty(logits.shape[0], dtype=wide_dtype(logits))


if triton.available():

    @cross_entropy_.register_kernel("cuda")
    def _(logits: Tensor, targets: Tensor, scale: float, softcap: float | None) -> Tensor:
        from nybble.ops.triton import cross_entropy as kernels

        return kernels.cross_entropy_(logits, targets, scale, softcap)


def capped(x: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor | float]:
    """The model's logits z of what its head gave, x, and dz / dx."""
    z = x * scale
    if softcap is None:
        return z, scale
    unit = torch.tanh(z / softcap)
    return softcap * unit, scale * (1 - unit * unit)
