"""Only deterministic kernels, for the length of a run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def deterministic_kernels(*, enabled: bool) -> Iterator[None]:
    """The same run gives the same bits on a GPU too, at some cost in speed; kernels that cannot raise RuntimeError."""
    if not enabled:
        yield
        return
    # cuBLAS reads this when it is first used; without it PyTorch refuses every GEMM in this mode.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
