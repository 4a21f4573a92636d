"""Page-locked host memory, which a device copies from and to without waiting."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

_MAPPED = 2  # cudaHostRegisterMapped: kernels can read it as well


def pinned(nbytes: int) -> Tensor:
    """Page-locked host memory of exactly this size, uint8. PyTorch's own allocator takes the next power of two.

    It is given back when the last tensor over it is gone; whoever drops it sees to it that no copy is under way.
    Raises MemoryError if the system does not lock so much. Without a GPU it is plain memory.
    """
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    try:
        pages = _LockedPages(-1, nbytes)  # of nothing else: a page cannot be locked twice
    except OSError as error:
        raise MemoryError(f"{nbytes} bytes of host memory are not there") from error
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    if torch.cuda.is_available():
        pages.lock(memory.data_ptr())
    return memory


class _LockedPages(mmap.mmap):
    """Anonymous pages that are locked as long as they live."""

    address = 0  # 0: not locked

    def lock(self, address: int) -> None:
        code = torch.cuda.cudart().cudaHostRegister(address, len(self), _MAPPED)  # type: ignore[no-untyped-call]
        if int(code) != 0:
            _forget_error()
            raise MemoryError(f"{len(self)} bytes of host memory cannot be locked (CUDA error {int(code)})")
        self.address = address

    def __del__(self) -> None:
        if self.address:
            with contextlib.suppress(AttributeError):  # as the interpreter ends, torch may be gone before
                torch.cuda.cudart().cudaHostUnregister(self.address)  # type: ignore[no-untyped-call]


def _forget_error() -> None:
    """Have CUDA forget a call that failed: it would be reported of the next kernel that is launched, once."""
    with contextlib.suppress(RuntimeError):
        torch.empty(1, device="cuda").fill_(0.0)
