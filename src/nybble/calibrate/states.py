"""Hidden states of a text on their way through a model's layers, and what linears see of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.calibrate.layer import Layer
from nybble.calibrate.moments import InputMoments


class Stream:
    """Hidden states (1, length, hidden_size) of each window before a layer, on the host; for a GPU in pinned memory."""

    def __init__(self, hidden: Iterable[Tensor], device: torch.device) -> None:
        self._device = device
        self._windows = [window.pin_memory() if device.type == "cuda" else window.clone() for window in hidden]

    def __len__(self) -> int:
        """Windows."""
        return len(self._windows)

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self._windows[0].shape[1]

    def on_device(self, order: Iterable[int] | None = None) -> Iterator[Tensor]:
        """The windows one after the other, each copied when it is its turn. order: their numbers."""
        windows = self._windows if order is None else map(self._windows.__getitem__, order)
        return (window.to(self._device, non_blocking=True) for window in windows)

    def advance(self, layer: Layer) -> None:
        """Go on behind `layer`."""
        for window, given in zip(self._windows, self.on_device(), strict=True):
            # The host reads no window, and the device copies in order: there is nothing to wait for.
            window.copy_(layer.call(layer.module, given), non_blocking=True)


@dataclass(frozen=True)
class States:
    """What comes to a layer from those before it: as these are `changed`, and as they were where that is needed."""

    changed: Stream
    original: Stream | None

    def moments(self, changed: Layer, original: Layer, paths: Iterable[str]) -> InputMoments:
        """What the linears `paths` of a layer see, as it is changed so far. original: the layer as it was."""
        moments, linears = InputMoments(self.changed.length), list(paths)
        if self.original is None:
            with moments.watching(changed.dense(linears)):
                for window in self.changed.on_device():
                    changed.call(changed.module, window)
            return moments
        with moments.watching(changed.dense(linears), original.dense(linears)):
            for beside, window in zip(self.original.on_device(), self.changed.on_device(), strict=True):
                original.call(original.module, beside)
                changed.call(changed.module, window)
        return moments

    def advance(self, changed: Layer, original: Layer) -> None:
        """Go on behind a layer."""
        self.changed.advance(changed)
        if self.original is not None:
            self.original.advance(original)
