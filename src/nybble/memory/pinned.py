"""Page-locked host memory, which a device copies from and to without waiting."""

from __future__ import annotations

import torch
from torch import Tensor

_MAPPED = 2  # cudaHostRegisterMapped: kernels can read it as well
_PAGE_BYTES = 4096


def pinned(nbytes: int) -> Tensor:
    """Page-locked host memory of exactly this size, uint8. PyTorch's own allocator takes the next power of two.

    Raises MemoryError if the system does not lock so much. Without a GPU it is plain memory.
    """
    # Whole pages of its own: they are what is locked, and none can be locked twice.
    locked_bytes = -(-nbytes // _PAGE_BYTES) * _PAGE_BYTES
    memory = torch.empty(locked_bytes + _PAGE_BYTES, dtype=torch.uint8)
    start = -memory.data_ptr() % _PAGE_BYTES
    memory = memory[start : start + nbytes]
    if torch.cuda.is_available() and nbytes:
        code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), locked_bytes, _MAPPED)  # type: ignore[no-untyped-call]
        if int(code) != 0:
            raise MemoryError(f"{nbytes} bytes of host memory cannot be locked (CUDA error {int(code)})")
    return memory


def unpin(memory: Tensor) -> None:
    """Undo `pinned`: the memory can be freed."""
    if torch.cuda.is_available() and memory.numel():
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call]
