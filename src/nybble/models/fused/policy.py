"""How a plan is carried out: which blocks keep what, and which are recomputed together from what."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from nybble.memory.offload import HostStore
from nybble.memory.saved import SavedOnHost
from nybble.memory.transfer import SideStream
from nybble.models.fused.block import Block, Half, Positions, Stream, through
from nybble.models.fused.recompute import Segment
from nybble.models.fused.rows import MlpByRows
from nybble.plan import Activations, MemoryPlan

_RECOMPUTED = ("recompute", "offload")


@dataclass(frozen=True)
class KeptHalves:
    """Halves of blocks whose regions keep what their backward passes read, on the device or in a store."""

    halves: Sequence[Half]
    store: SavedOnHost | None = None

    def __call__(self, stream: Stream, positions: Positions) -> Stream:
        if self.store is None:
            return through(self.halves, stream, positions)
        with self.store.saving(tokens=len(stream[1].base)):
            return through(self.halves, stream, positions)


Unit = KeptHalves | Segment


@dataclass(frozen=True)
class Units:
    """The parts of a body in order, and where those keep on the host what they do."""

    parts: Sequence[Unit]
    stores: Sequence[HostStore | SavedOnHost]

    def begin(self) -> None:
        """A forward pass begins."""
        if torch.is_grad_enabled():
            for store in self.stores:
                store.begin()

    def __iter__(self) -> Iterator[Unit]:
        return iter(self.parts)


def units_of(blocks: Sequence[Block], plan: MemoryPlan, device: torch.device, *, most_tokens: int = 0) -> Units:
    """The blocks as `plan` has them. Where there is no GPU, the host's memory is all there is.

    most_tokens: of a micro-batch, as far as they are known; for so many, memory of the host is pinned at once.
    """
    parts = [(kind, part) for kind, span in _spans(blocks, plan) for part in _parts(kind, span, plan)]
    kinds = [kind for kind, _ in parts]
    has_host = device.type == "cuda"
    streams = (
        HostStore(kinds.count("offload"), SideStream(device), most_tokens) if has_host and "offload" in kinds else None
    )
    saved = SavedOnHost(device, most_tokens) if has_host and "keep_on_host" in kinds else None
    units = [_unit(kind, halves, streams, saved) for kind, halves in parts]
    return Units(units, [store for store in (streams, saved) if store is not None])


def _spans(blocks: Sequence[Block], plan: MemoryPlan) -> Iterator[tuple[Activations, list[Block]]]:
    """Blocks that are held alike, and of those recomputed as many together as the plan says, from multiples of that."""

    def key(index: int) -> tuple[Activations, int]:
        kind = plan.layers[index].activations
        return kind, index // plan.span if kind in _RECOMPUTED else index

    for (kind, _), indices in groupby(range(len(blocks)), key=key):
        yield kind, [blocks[index] for index in indices]


def _parts(kind: Activations, span: Sequence[Block], plan: MemoryPlan) -> list[list[Half]]:
    """The halves of a span, all together or, so that the stream between them is kept too, each by itself."""
    halves = [half for block in span for half in _halves(block, kind, plan)]
    # A norm after attention (Gemma) needs what the product before it gave: keeping the stream would spare nothing.
    middle = kind == "offload" and plan.keep_middle and plan.span == 1 and span[0].attention.after is None
    return [[half] for half in halves] if middle else [halves]


def _halves(block: Block, kind: Activations, plan: MemoryPlan) -> tuple[Half, Half]:
    rows = plan.mlp_rows if kind in _RECOMPUTED else None
    if rows is None and kind not in ("keep_matmuls", "keep_on_host"):
        return block.attention, block.mlp
    attention = dataclasses.replace(block.attention, keep_normed=False)
    mlp = dataclasses.replace(block.mlp, keep_normed=False)
    return attention, mlp if rows is None else MlpByRows(mlp, rows)


def _unit(kind: Activations, halves: Sequence[Half], streams: HostStore | None, saved: SavedOnHost | None) -> Unit:
    if kind in _RECOMPUTED:
        return Segment(halves, streams if kind == "offload" else None)
    return KeptHalves(halves, saved if kind == "keep_on_host" else None)
