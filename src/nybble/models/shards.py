"""Safetensors files and their index, written tensor by tensor: what is written is never in memory as a whole."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch

from nybble.errors import UserError
from nybble.files import read_json, write_json
from nybble.models.tensorfile import SAFETENSORS_DTYPES

MAX_SHARD_BYTES = 5 * 10**9  # what Transformers writes; some hosts refuse files far larger

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
# An entry without its name: {"dtype":"F8_E4M3","shape":[...],"data_offsets":[...,...]}, five dimensions of 12 digits.
_ENTRY_BYTES = 200


def read_weight_map(folder: Path) -> dict[str, str]:
    """File by tensor as the index in `folder` says, empty without one; raises UserError for an index that is broken."""
    if not (folder / INDEX).exists():
        return {}
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError("has no weight_map from tensors to files", where=folder / INDEX)
    if outside := sorted({name for name in weight_map.values() if Path(name).name != name}):
        raise UserError(f"names files outside its folder: {', '.join(outside)}", where=folder / INDEX)
    return weight_map


class ShardWriter:
    """Writes `model.safetensors`, or several files and their index, into a folder; use it in a `with` block.

    The header comes first in the file but is known last, so room is kept for it: `header_bytes`, see `header_room`.
    on_file: called with each file once it is whole; may take it away.
    """

    def __init__(
        self,
        folder: Path,
        header_bytes: int,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        *,
        on_file: Callable[[Path], None] | None = None,
    ) -> None:
        self.folder = folder
        self.total_bytes = 0
        self._on_file = on_file
        self._header_bytes = header_bytes
        self._max_shard_bytes = max_shard_bytes
        self._shards: list[_Shard] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        else:
            for shard in self._shards:
                shard.stream.close()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor, from any device; a new shard begins where this one would grow too large."""
        self.add_blocks(name, tensor.dtype, tuple(tensor.shape), [tensor])

    def add_blocks(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], blocks: Iterable[torch.Tensor]) -> None:
        """Append a tensor of `shape`: `blocks` are its values in `dtype`, row by row, and one is held at a time."""
        nbytes = prod(shape) * dtype.itemsize
        if not self._shards or not self._shards[-1].has_room(nbytes, self._max_shard_bytes):
            self._next_shard()
        self._shards[-1].add(name, dtype, shape, blocks)
        self.total_bytes += nbytes

    def _next_shard(self) -> None:
        if self._shards:
            self._finish_shard()
        path = self.folder / f"model-{len(self._shards) + 1:05d}.safetensors"
        self._shards.append(_Shard(path, self._header_bytes))

    def _finish_shard(self) -> None:
        self._shards[-1].finish()
        if self._on_file is not None:
            self._on_file(self._shards[-1].path)

    def _finish(self) -> None:
        if not self._shards:
            self._next_shard()
        self._finish_shard()
        if len(self._shards) == 1:
            _rename(self._shards[0].path, self.folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self._shards, 1):
            path = self.folder / f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            _rename(shard.path, path)
            weight_map |= dict.fromkeys(shard.entries, path.name)
        metadata = {"total_size": self.total_bytes}
        write_json(self.folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def header_room(names: list[str]) -> int:
    """Bytes that a header with these names takes at most, were all of them in one shard."""
    return 4096 + sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names)


def _rename(path: Path, name: Path) -> None:
    if path.exists():  # it may have been taken away
        path.rename(name)


class _Shard:
    def __init__(self, path: Path, header_bytes: int) -> None:
        self.path = path
        self.stream: BinaryIO = path.open("wb")
        self.nbytes = 0
        self.entries: dict[str, dict[str, object]] = {}
        self._room = -(-header_bytes // 8) * 8
        self._odd: list[tuple[str, torch.Tensor]] = []
        self._written = 0
        self.stream.seek(8 + self._room)

    def has_room(self, num_bytes: int, max_bytes: int) -> bool:
        return self.nbytes == 0 or self.nbytes + num_bytes <= max_bytes

    def add(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], blocks: Iterable[torch.Tensor]) -> None:
        nbytes = prod(shape) * dtype.itemsize
        self.nbytes += nbytes
        if nbytes % 8:
            # The format allows no gaps: these few go to the end, so that all others begin at a multiple of 8.
            held = torch.cat([block.detach().reshape(-1).to("cpu", copy=True) for block in blocks])
            self._odd.append((name, held.view(shape)))
        else:
            self._write(name, dtype, shape, blocks)

    def finish(self) -> None:
        for name, tensor in sorted(self._odd, key=lambda item: -item[1].itemsize):
            self._write(name, tensor.dtype, tuple(tensor.shape), [tensor])
        self._odd.clear()
        header = json.dumps({"__metadata__": {"format": "pt"}, **self.entries}, separators=(",", ":")).encode()
        assert len(header) <= self._room, f"{len(header)} bytes of header, room for {self._room}"
        self.stream.seek(0)
        self.stream.write(struct.pack("<Q", self._room) + header.ljust(self._room))
        self.stream.close()

    def _write(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], blocks: Iterable[torch.Tensor]) -> None:
        begin = self._written
        for block in blocks:
            flat = block.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            self.stream.write(flat.numpy().data)
            self._written += flat.numel()
            del block, flat  # before the next one comes
        assert self._written - begin == prod(shape) * dtype.itemsize, f"{name}: {self._written - begin} bytes"
        self.entries[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, self._written],
        }
