"""Named tensors in one or more safetensors files, made and written a shard at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nybble.sharded import full_tensor
from nybble.train.processes import rank

# Host memory that writing needs at most beside the tensors themselves.
SHARD_BYTES = 4 * 2**30


def write_tensors(folder: Path, stem: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write `folder/stem-00001.safetensors` and so on. Every process calls, to gather shards of each; rank 0 writes."""
    for number, shard in enumerate(_shards(tensors), start=1):
        if rank() == 0:
            save_file(shard, folder / f"{stem}-{number:05d}.safetensors")


def read_tensors(folder: Path, stem: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors that `write_tensors` wrote, one in memory at a time."""
    for file in sorted(folder.glob(f"{stem}-*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                yield name, opened.get_tensor(name)


def _shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        # A copy even on the CPU: safetensors refuses tensors that share memory.
        shard[name] = full_tensor(tensor.detach()).to("cpu", copy=True).contiguous()
        if sum(t.nbytes for t in shard.values()) >= SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard
