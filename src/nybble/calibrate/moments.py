"""Second moments of what linears see: the mean of y y^T over tokens as they weigh, gathered while a layer runs.

Linears that read the same tensor (q, k and v; gate and up) share one matrix. Where the 16-bit model runs beside them,
on the same text, its inputs x give their drift too: the mean of (x - y) y^T.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Seen:
    """Of inputs y, (in, in), fp32: the mean of y y^T, and that of (x - y) y^T where x was there."""

    moments: Tensor
    drift: Tensor | None


class InputMoments:
    """Sums over all tokens that linears were given.

    rows: tokens of a call of the layer. weights: of the tokens of each call, (calls, rows), 1 in the mean; None: alike.
    """

    def __init__(self, rows: int = 0, weights: Tensor | None = None) -> None:
        self._rows = rows
        self._roots = None if weights is None else weights.sqrt()
        self._shared: dict[str, str] = {}  # path -> the path whose sum it shares
        self._sums: dict[str, Tensor] = {}
        self._drifts: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._originals: dict[str, Tensor] = {}  # x of the call that comes next
        self._paired: dict[str, int] = {}  # tokens with x
        self._latest: tuple[str, Tensor] | None = None

    @contextlib.contextmanager
    def watching(
        self, linears: Mapping[str, nn.Module], originals: Mapping[str, nn.Module] | None = None
    ) -> Iterator[None]:
        """Inside, every call of one of `linears` adds its inputs.

        originals: by the same paths, called before them for the same tokens, with the inputs of the 16-bit model.
        A linear that ever gets other rows than its original, as an expert does, has no drift.
        """
        hooks = [
            linear.register_forward_pre_hook(lambda _, inputs, path=path: self._add(path, inputs[0]))
            for path, linear in linears.items()
        ]
        hooks += [
            linear.register_forward_pre_hook(lambda _, inputs, path=path: self._keep(path, inputs[0]))
            for path, linear in (originals or {}).items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._latest = None
            self._originals.clear()

    def groups(self) -> Iterator[tuple[list[str], Seen]]:
        """Linears that share their inputs, and what was seen of these. Never called: in no group.

        A sum is let go of with its group, so this may be gone through once.
        """
        for owner in list(self._sums):
            tokens, drift = self._tokens[owner], self._drifts.pop(owner, None)
            if drift is not None:
                drift = drift.div_(tokens) if self._paired[owner] == tokens else None
            seen = Seen(self._sums.pop(owner).div_(tokens), drift)
            yield [owner, *(path for path, shared in self._shared.items() if shared == owner)], seen

    def _keep(self, path: str, inputs: Any) -> None:
        self._originals[path] = inputs

    def _add(self, path: str, inputs: Any) -> None:
        original = self._originals.pop(path, None)
        # Called one after the other on the very same tensor: their sums are the same.
        if self._latest is not None and self._latest[1] is inputs and self._latest[0] != path:
            self._shared[path] = self._latest[0]
            return
        self._latest = (path, inputs)
        if path not in self._sums:
            self._sums[path] = inputs.new_zeros(inputs.shape[-1], inputs.shape[-1], dtype=torch.float32)
            self._tokens[path] = 0
        rows = self._weighed(path, inputs)
        self._sums[path].addmm_(rows.t(), rows)
        if original is not None and original.shape == inputs.shape and len(rows) == self._rows:
            if path not in self._drifts:
                self._drifts[path] = torch.zeros_like(self._sums[path])
                self._paired[path] = 0
            self._paired[path] += len(rows)
            self._drifts[path].addmm_((self._weighed(path, original) - rows).t(), rows)
        self._tokens[path] += len(rows)

    def _weighed(self, path: str, inputs: Tensor) -> Tensor:
        """Rows of the call that comes next, times the roots of their weights, so that a product of two has these."""
        rows = inputs.detach().flatten(0, -2).float()
        if self._roots is None or len(rows) != self._rows:
            return rows
        return rows * self._roots[self._tokens[path] // self._rows, :, None]
