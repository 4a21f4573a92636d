"""Reading safetensors files one tensor at a time; only what is to stay on disk is mapped.

A mapped file counts as resident memory page by page, so after a load the process would seem to hold the whole
checkpoint. Read into a buffer of its own, a tensor is gone when its owner drops it.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch

from nybble.errors import UserError
from nybble.files import explain_no_permission

# The format's names; files with others (its sub-byte types) are refused with the name.
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# New memory costs a page fault every 4 KiB, so one thread reads 1 GB/s from the page cache; several share the faults.
READERS = 8
SEGMENT_BYTES = 8 * 2**20

# Larger tensors are read in parts where something else is made of them: 0.4 GiB of an MLP of 70B, 2 GiB of its
# embedding. A part takes 2.5 ms of a bus of 25 GB/s, far more than what is launched for it.
BLOCK_BYTES = 64 * 2**20

_LENGTH = struct.Struct("<Q")  # the file begins with the header's length in bytes


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: bytes [start, start + nbytes) of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_large(self) -> bool:
        """Whether it takes several blocks."""
        return self.nbytes > BLOCK_BYTES

    def read(self) -> torch.Tensor:
        """A tensor on the CPU that owns its memory."""
        buffer = torch.empty(self.nbytes, dtype=torch.uint8)
        memory = buffer.numpy().data
        if self.nbytes <= SEGMENT_BYTES:
            self.read_into(memory, 0)
        else:
            starts = range(0, self.nbytes, SEGMENT_BYTES)
            with ThreadPoolExecutor(READERS) as readers:
                list(readers.map(lambda start: self.read_into(memory[start : start + SEGMENT_BYTES], start), starts))
        return buffer.view(self.dtype).reshape(self.shape)

    def part(self, start: int, stop: int) -> TensorEntry:
        """Values [start, stop) of the tensor read row by row, as a flat tensor of its own."""
        return replace(self, shape=(stop - start,), start=self.start + start * self.dtype.itemsize)

    def blocks(self) -> list[TensorEntry]:
        """The tensor in flat parts of BLOCK_BYTES; all but the last hold a multiple of 4,096 values."""
        numel, step = math.prod(self.shape), BLOCK_BYTES // self.dtype.itemsize
        return [self.part(start, min(start + step, numel)) for start in range(0, numel, step)]

    def read_into(self, memory: memoryview, offset: int) -> None:
        """Fill `memory` with the tensor's bytes from `offset` on; raises UserError if the file ends before."""
        with explain_no_permission(self.file), self.file.open("rb") as stream:
            stream.seek(self.start + offset)
            if stream.readinto(memory) != len(memory):
                raise UserError("ends before its tensors do", where=self.file, fix="Fetch the checkpoint again.")

    def mapped(self) -> torch.Tensor:
        """A tensor whose memory is the file's: what is not in the page cache is read when it is touched. Read-only."""
        if not self.nbytes:
            return self.read()
        # "c": who writes to it writes to a copy; for "r" PyTorch warns that nobody may.
        with explain_no_permission(self.file):
            memory = numpy.memmap(self.file, dtype=numpy.uint8, mode="c", offset=self.start, shape=(self.nbytes,))
        return torch.from_numpy(memory).view(self.dtype).reshape(self.shape)

    def read_bytes(self, offset: int, length: int) -> bytes:
        with explain_no_permission(self.file), self.file.open("rb") as stream:
            stream.seek(self.start + offset)
            return stream.read(min(length, self.nbytes - offset))


@dataclass(frozen=True)
class TensorBlocks:
    """A large tensor on its way: flat blocks of its values, row by row, to be taken once. One is held at a time."""

    shape: tuple[int, ...]
    device: torch.device
    blocks: Iterator[torch.Tensor]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """What `function` makes of each block, put together to a tensor of `shape`, in its dtype and on its device."""
        result, start = torch.empty(0), 0
        for block in self.blocks:
            part = function(block)
            if start == 0:
                result = part.new_empty(math.prod(self.shape))
            result[start : start + part.numel()] = part
            start += part.numel()
            del block, part  # before the next one comes
        assert start == math.prod(self.shape)
        return result.view(self.shape)


def read_entries(file: Path) -> dict[str, TensorEntry]:
    """Every tensor of a safetensors file by name, from its header alone.

    Raises UserError when the file is missing, truncated, or its header is not what the format says.
    """
    size = _size(file)
    with explain_no_permission(file), file.open("rb") as stream:
        head = stream.read(_LENGTH.size)
        length = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else size
        data_start = _LENGTH.size + length
        if data_start > size:
            raise UserError("is truncated, or no safetensors file", where=file, fix="Fetch the checkpoint again.")
        header = _parse_header(file, stream.read(length))
    entries = {name: _entry(file, name, value, data_start) for name, value in header.items()}
    end = max((entry.start + entry.nbytes for entry in entries.values()), default=data_start)
    if end > size:
        raise UserError(
            f"is truncated: {end - size:,} bytes are missing", where=file, fix="Fetch the checkpoint again."
        )
    return entries


def _size(file: Path) -> int:
    try:
        with explain_no_permission(file):
            return file.stat().st_size
    except FileNotFoundError:
        raise UserError("no such file", where=file, fix="Fetch the checkpoint again.") from None


def _parse_header(file: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise UserError("its safetensors header is corrupt", where=file, fix="Fetch the checkpoint again.")
    header.pop("__metadata__", None)
    return header


def _entry(file: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    try:
        dtype_name, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        dtype = SAFETENSORS_DTYPES[dtype_name]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"tensor {name!r} has a header entry that cannot be read: {value}", where=file) from None
    entry = TensorEntry(file, dtype, shape, data_start + begin)
    if end - begin != entry.nbytes:
        raise UserError(f"tensor {name!r} of shape {shape} does not have its {entry.nbytes:,} bytes", where=file)
    return entry
