"""What tensors hold while real code runs on a CPU, counted as a GPU's allocator would."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nybble.planner.tape import rounded


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The bytes of all tensors made within and still alive, and the most that they ever were.

    What an op makes and frees within itself is not seen. at_most: size and origin of those alive when most was held.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.most = 0
        self.alive: dict[int, tuple[int, str]] = {}
        self.at_most: list[tuple[int, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs or {}))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if id(storage) not in self.alive and id(storage) not in inputs and storage.nbytes():
                self._count(storage, f"{func} {tuple(tensor.shape)}")
        return result

    def _count(self, storage: Any, what: str) -> None:
        key, size = id(storage), rounded(storage.nbytes())
        self.alive[key] = size, what
        self.held += size
        weakref.finalize(storage, self._forget, key)
        if self.held > self.most:
            self.most, self.at_most = self.held, list(self.alive.values())

    def _forget(self, key: int) -> None:
        self.held -= self.alive.pop(key)[0]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, list | tuple) else []


class Flash(torch.autograd.Function):
    """Keeps what attention on a GPU keeps, and gives what has its shapes."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = torch.zeros_like(q)
        row_sums, seed, offset = torch.zeros(q.shape[:2]), torch.zeros(1), torch.zeros(1)
        ctx.save_for_backward(q, k, v, output, row_sums, seed, offset)
        return output

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004
        q, k, v, *_ = ctx.saved_tensors
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
