"""A tensor that may be split over processes: put together, and split again as another one is."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensor(value: Tensor) -> Tensor:
    """The whole of `value`; where it is sharded, every process must call."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def sharded_like(whole: Tensor, template: Tensor) -> Tensor:
    """`whole` with the dtype and on the device of `template`, and split over processes as it is."""
    whole = whole.to(template.device, template.dtype)
    if isinstance(template, DTensor):
        return distribute_tensor(whole, template.device_mesh, template.placements)
    return whole
