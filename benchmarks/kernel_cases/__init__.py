"""What `benchmarks/kernels.py` measures: each file here has `cases() -> list[KernelBenchmark]` for one op family."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class KernelBenchmark:
    """One op on tensors of one size.

    `arguments` makes the op's positional arguments on a device when it is this case's turn, so that not all cases are
    in memory at once. Bytes are those of all tensors among arguments and results, each once, and once more for the
    arguments at the positions `mutated`, which the op reads and writes; or `num_bytes`, where it reads little of some.
    from_host: those are read from host memory, so that the copy beside it is one from there.
    """

    op: Callable[..., Any]
    name: str  # op and whatever tells this case from the others of one shape
    shape: str
    arguments: Callable[[torch.device], tuple[Any, ...]]
    options: dict[str, Any] = field(default_factory=dict)
    mutated: tuple[int, ...] = ()
    num_bytes: int | None = None
    from_host: bool = False
    flops: int = 0  # for what multiplies matrices: TFLOP/s are printed too


def all_cases() -> list[KernelBenchmark]:
    files = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [case for name in files for case in importlib.import_module(f"{__name__}.{name}").cases()]


def randn(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)
