"""What one process must know of the others. Without a process group there is one, and every call here is a no-op."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of every process's `value`, as a new tensor; `value` itself where there is one process."""
    if world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


@contextlib.contextmanager
def gradient_sync(module: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Whether backward inside exchanges gradients with the other processes: only a step's last micro-batch needs to."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(enabled)
        yield
    elif isinstance(module, DistributedDataParallel) and not enabled:
        with module.no_sync():
            yield
    else:
        yield
