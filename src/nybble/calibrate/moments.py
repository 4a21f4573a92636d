"""Second moments of what linears see: the mean of x x^T over tokens, gathered while a layer runs.

Linears that read the same tensor (q, k and v; gate and up) share one matrix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


class InputMoments:
    """Sums over all tokens that linears were given."""

    def __init__(self) -> None:
        self._shared: dict[str, str] = {}  # path -> the path whose sum it shares
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._latest: tuple[str, Tensor] | None = None

    @contextlib.contextmanager
    def watching(self, linears: Mapping[str, nn.Module]) -> Iterator[None]:
        """Inside, every call of one of `linears` adds its inputs."""
        hooks = [
            linear.register_forward_pre_hook(lambda _, inputs, path=path: self._add(path, inputs[0]))
            for path, linear in linears.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._latest = None

    def groups(self) -> Iterator[tuple[list[str], Tensor]]:
        """Linears that share their inputs, and the second moments (in, in) of these, fp32. Never called: in no group.

        A sum is let go of with its group, so this may be gone through once.
        """
        for owner in list(self._sums):
            mean = self._sums.pop(owner).div_(self._tokens[owner])
            yield [owner, *(path for path, shared in self._shared.items() if shared == owner)], mean

    def _add(self, path: str, inputs: Any) -> None:
        # Called one after the other on the very same tensor: their sums are the same.
        if self._latest is not None and self._latest[1] is inputs:
            self._shared[path] = self._latest[0]
            return
        self._latest = (path, inputs)
        rows = inputs.detach().flatten(0, -2).float()
        if path not in self._sums:
            self._sums[path] = rows.new_zeros(rows.shape[1], rows.shape[1])
            self._tokens[path] = 0
        self._sums[path].addmm_(rows.t(), rows)
        self._tokens[path] += len(rows)
