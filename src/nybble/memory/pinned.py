"""Page-locked host memory, which a device copies from and to without waiting."""

from __future__ import annotations

import torch
from torch import Tensor

_MAPPED = 2  # cudaHostRegisterMapped: kernels can read it as well


def pinned(nbytes: int) -> Tensor:
    """Page-locked host memory of exactly this size, uint8. PyTorch's own allocator takes the next power of two.

    Raises MemoryError if the system does not lock so much. Without a GPU it is plain memory.
    """
    memory = torch.empty(nbytes, dtype=torch.uint8)
    if torch.cuda.is_available() and nbytes:
        code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), nbytes, _MAPPED)  # type: ignore[no-untyped-call]
        if int(code) != 0:
            raise MemoryError(f"{nbytes} bytes of host memory cannot be locked (CUDA error {int(code)})")
    return memory


def unpin(memory: Tensor) -> None:
    """Undo `pinned`: the memory can be freed."""
    if torch.cuda.is_available() and memory.numel():
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call]
