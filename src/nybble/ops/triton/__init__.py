"""Triton kernels, one file an op family; imported only where Triton is installed and a CUDA tensor asks for them."""

from __future__ import annotations

from importlib.util import find_spec


def available() -> bool:
    """Whether Triton can be imported: not on macOS, nor beside a build of PyTorch for CPUs alone."""
    return find_spec("triton") is not None
