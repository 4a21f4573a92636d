"""Errors that say that memory ran out: which ones those are, and whose memory it was."""

from __future__ import annotations

import torch

_HOST_WORDING = "can't allocate memory"
# What libraries say beside PyTorch's allocators, which have an exception on GPUs, but none on CPUs.
_WORDINGS = (_HOST_WORDING, "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(wording in str(error) for wording in _WORDINGS)


def is_of_the_host(error: BaseException) -> bool:
    """Of an error that `is_out_of_memory`: whether the host's ran out, not a device's."""
    return isinstance(error, MemoryError) or _HOST_WORDING in str(error)
