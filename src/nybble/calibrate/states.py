"""Hidden states of a text on their way through a model's layers, and what linears see of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nybble.calibrate.layer import Layer
from nybble.calibrate.moments import InputMoments


class Stream:
    """Hidden states of all windows before a layer, on the host; for a GPU in pinned memory.

    hidden: batches of as many windows, (at_once, length, hidden_size).
    """

    def __init__(self, hidden: Iterable[Tensor], device: torch.device) -> None:
        self.device = device
        self._batches = [_room_for(batch, device).copy_(batch) for batch in hidden]

    def __len__(self) -> int:
        """Windows."""
        return len(self._batches) * self.at_once

    @property
    def at_once(self) -> int:
        """Windows of a batch."""
        return len(self._batches[0])

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self._batches[0].shape[1]

    @property
    def rows(self) -> int:
        """Tokens of a batch."""
        return self._batches[0].shape[:2].numel()

    def on_device(self) -> Iterator[Tensor]:
        """The batches one after the other, each copied when it is its turn."""
        return (batch.to(self.device, non_blocking=True) for batch in self._batches)

    def windows(self, groups: Iterable[Sequence[int]]) -> Iterator[Tensor]:
        """Windows by their numbers, those of a group together, (windows, length, hidden_size)."""
        return (torch.stack([self._window(number) for number in numbers]) for numbers in groups)

    def _window(self, number: int) -> Tensor:
        batch, row = divmod(number, self.at_once)
        return self._batches[batch][row].to(self.device, non_blocking=True)

    def advance(self, layer: Layer) -> None:
        """Go on behind `layer`."""
        self.replace(partial(layer.call, layer.module))

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        """Hold what `change` makes of each batch, one after the other."""
        self._write(change, self._batches)

    def behind(self, layer: Layer) -> Stream:
        """What comes behind `layer`; this stays before it."""
        found = copy.copy(self)
        found._batches = [_room_for(batch, self.device) for batch in self._batches]
        self._write(partial(layer.call, layer.module), found._batches)
        return found

    def parts(self, nbytes: int) -> Iterator[Stream]:
        """The batches in streams of so many bytes, or of one batch."""
        batches = max(1, nbytes // self._batches[0].nbytes)
        for start in range(0, len(self._batches), batches):
            found = copy.copy(self)
            found._batches = self._batches[start : start + batches]
            yield found

    def _write(self, change: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> None:
        for batch, given in zip(batches, self.on_device(), strict=True):
            # The host reads no batch, and the device copies in order: there is nothing to wait for.
            batch.copy_(change(given), non_blocking=True)


@dataclass(frozen=True)
class States:
    """What comes to a layer from those before it: as these are `changed`, and as they were where that is needed."""

    changed: Stream
    original: Stream | None

    def moments(
        self, changed: Layer, original: Layer, paths: Iterable[str], weights: Tensor | None = None
    ) -> InputMoments:
        """What the linears `paths` of a layer see, as it is changed so far. original: the layer as it was.

        weights: of the tokens of each batch, (batches, tokens of a batch).
        """
        moments, linears = InputMoments(self.changed.rows, weights), list(paths)
        if self.original is None:
            with moments.watching(changed.dense(linears)):
                for batch in self.changed.on_device():
                    changed.call(changed.module, batch)
            return moments
        with moments.watching(changed.dense(linears), original.dense(linears)):
            for beside, batch in zip(self.original.on_device(), self.changed.on_device(), strict=True):
                original.call(original.module, beside)
                changed.call(changed.module, batch)
        return moments

    def advance(self, changed: Layer, original: Layer) -> None:
        """Go on behind a layer."""
        self.changed.advance(changed)
        if self.original is not None:
            self.original.advance(original)


def _room_for(batch: Tensor, device: torch.device) -> Tensor:
    return torch.empty(batch.shape, dtype=batch.dtype, pin_memory=device.type == "cuda")
