"""How a plan is carried out: which blocks keep what, and which are recomputed together from what."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from nybble.memory.offload import HostStore
from nybble.models.fused.block import Block, Half, Positions, Stream, through
from nybble.models.fused.recompute import Segment
from nybble.models.fused.rows import MlpByRows
from nybble.plan import Activations, MemoryPlan


@dataclass(frozen=True)
class KeptHalves:
    """Halves of blocks whose regions keep what their backward passes read."""

    halves: Sequence[Half]

    def __call__(self, stream: Stream, positions: Positions) -> Stream:
        return through(self.halves, stream, positions)


Unit = KeptHalves | Segment


@dataclass(frozen=True)
class Units:
    """The parts of a body in order, and where those that are offloaded keep their streams."""

    parts: Sequence[Unit]
    store: HostStore | None

    def begin(self) -> None:
        """A forward pass begins."""
        if self.store is not None and torch.is_grad_enabled():
            self.store.begin()

    def __iter__(self) -> Iterator[Unit]:
        return iter(self.parts)


def units_of(blocks: Sequence[Block], plan: MemoryPlan, device: torch.device) -> Units:
    """The blocks as `plan` has them. Where there is no GPU the host's memory is all there is: nothing is offloaded."""
    spans = [span for kind, run in _runs(blocks, plan) for span in _spans(kind, run, plan)]
    num_offloaded = sum(kind == "offload" for kind, _ in spans)
    store = HostStore(num_offloaded, device) if num_offloaded and device.type == "cuda" else None
    return Units([_unit(kind, halves, store) for kind, halves in spans], store)


def _runs(blocks: Sequence[Block], plan: MemoryPlan) -> Iterator[tuple[Activations, list[Block]]]:
    """Blocks in a row that are held alike."""
    pairs = zip([policy.activations for policy in plan.layers], blocks, strict=True)
    for kind, run in groupby(pairs, key=lambda pair: pair[0]):
        yield kind, [block for _, block in run]


def _spans(kind: Activations, run: Sequence[Block], plan: MemoryPlan) -> Iterator[tuple[Activations, list[Half]]]:
    """The halves of each unit of a run."""
    span = plan.span if kind in ("recompute", "offload") else 1
    for start in range(0, len(run), span):
        blocks = run[start : start + span]
        halves = [half for block in blocks for half in _halves(block, kind, plan)]
        # A norm after attention (Gemma) needs what the product before it gave: keeping the stream would spare nothing.
        middle = kind == "offload" and plan.keep_middle and span == 1 and blocks[0].attention.after is None
        yield from ((kind, part) for part in ([[half] for half in halves] if middle else [halves]))


def _halves(block: Block, kind: Activations, plan: MemoryPlan) -> tuple[Half, Half]:
    if kind in ("keep", "keep_matmuls"):
        attention, mlp = (
            dataclasses.replace(half, keep_normed=kind == "keep") for half in (block.attention, block.mlp)
        )
        return attention, mlp
    return block.attention, block.mlp if plan.mlp_rows is None else MlpByRows(block.mlp, plan.mlp_rows)


def _unit(kind: Activations, halves: Sequence[Half], store: HostStore | None) -> Unit:
    if kind in ("keep", "keep_matmuls"):
        return KeptHalves(halves)
    return Segment(halves, store if kind == "offload" else None)
