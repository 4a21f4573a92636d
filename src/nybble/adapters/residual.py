"""What is taken out of a base's weights while they are loaded, because an adapter starts with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.adapters.config import LoraConfig
from nybble.adapters.initialize import loftq, principal
from nybble.adapters.lora import ADAPTER_DTYPES, layer_generator
from nybble.adapters.names import is_named, left_out
from nybble.adapters.start import AdapterStart, Factors


@dataclass(frozen=True)
class KnownResidual:
    """Takes out what an adapter's start says."""

    start: AdapterStart

    def reaches(self, path: str) -> bool:
        """Whether the weight of the linear at `path` is changed."""
        return path in self.start.removed

    def __call__(self, path: str, weight: Tensor) -> Tensor:
        """What stays of the weight (out, in), in fp32."""
        return self.start.removed[path].taken_out_of(weight)


class FoundResidual:
    """Finds, weight by weight, where an adapter of `config` starts, by its `init`, and takes it out.

    quantize: a weight -> what a reader finds of it when it is held as this base holds it; loftq needs it.
    Holds the pairs on the CPU: twice the size of the adapter.
    """

    def __init__(self, config: LoraConfig, seed: int, quantize: Callable[[Tensor], Tensor]) -> None:
        self.config, self._seed, self._quantize = config, seed, quantize
        self.initial: dict[str, Factors] = {}
        self.removed: dict[str, Factors] = {}

    def reaches(self, path: str) -> bool:
        """Whether the weight of the linear at `path`, which is not the model's head, is changed."""
        return is_named(self.config, path) and not left_out(self.config, path)

    @torch.no_grad()
    def __call__(self, path: str, weight: Tensor) -> Tensor:
        """What stays of the weight (out, in), in fp32."""
        own, generator = self.config.at(path), layer_generator(self._seed, f"{path}.start")
        removed: Factors | None
        if own.init == "loftq":
            initial, removed = loftq(weight, own, generator, self._quantize, self._held)
        else:
            initial = removed = self._held(principal(weight, own, generator))
        self.initial[path] = _on_cpu(initial)
        if removed is None:
            return weight.float()
        self.removed[path] = _on_cpu(removed)
        return removed.taken_out_of(weight)

    def _held(self, factors: Factors) -> Factors:
        """As the adapter holds them: what is taken out is what the adapter then adds, to the bit."""
        dtype = ADAPTER_DTYPES[self.config.dtype]
        return Factors(factors.A.to(dtype), factors.B.to(dtype), factors.scaling)


def _on_cpu(factors: Factors) -> Factors:
    return Factors(factors.A.cpu(), factors.B.cpu(), factors.scaling)
