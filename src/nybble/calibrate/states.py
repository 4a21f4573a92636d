"""Hidden states of a text on their way through a model's layers, and what linears see of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.calibrate.finished import PreparedLinear
from nybble.calibrate.layer import Layer
from nybble.calibrate.moments import InputMoments


class Stream:
    """Hidden states (1, length, hidden_size) of each window before a layer, on the host; for a GPU in pinned memory."""

    def __init__(self, hidden: Iterable[Tensor], device: torch.device) -> None:
        self._device = device
        self._windows = [window.pin_memory() if device.type == "cuda" else window.clone() for window in hidden]

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self._windows[0].shape[1]

    def on_device(self) -> Iterator[Tensor]:
        """The windows one after the other, each copied when it is its turn."""
        return (window.to(self._device, non_blocking=True) for window in self._windows)

    def advance(self, layer: Layer) -> None:
        """Go on behind `layer`."""
        for window, given in zip(self._windows, self.on_device(), strict=True):
            # The host reads no window, and the device copies in order: there is nothing to wait for.
            window.copy_(layer.call(layer.module, given), non_blocking=True)


@dataclass(frozen=True)
class States:
    """What comes to a layer from those before it: in NF4; as they were; in NF4 with their corrections."""

    quantized: Stream
    original: Stream | None
    corrected: Stream | None

    def moments(self, stream: Stream, layer: Layer, original: Layer, paths: Iterable[str]) -> InputMoments:
        """What the linears `paths` of `layer` see of `stream`. original: the layer as it was."""
        moments, linears = InputMoments(stream.length), list(paths)
        if self.original is None:
            with moments.watching(layer.dense(linears)):
                for window in stream.on_device():
                    layer.call(layer.module, window)
            return moments
        with moments.watching(layer.dense(linears), original.dense(linears)):
            for beside, window in zip(self.original.on_device(), stream.on_device(), strict=True):
                original.call(original.module, beside)
                layer.call(layer.module, window)
        return moments

    def advance(self, layer: Layer, prepared: Mapping[str, PreparedLinear]) -> None:
        """Go on behind `layer`, whose linears were `prepared`, by path."""
        quantized = layer.copy()
        quantized.quantize_(prepared)
        self.quantized.advance(quantized)
        del quantized
        if self.corrected is not None:
            corrected = layer.copy()
            corrected.correct_(prepared)
            self.corrected.advance(corrected)
        if self.original is not None:
            self.original.advance(layer)
