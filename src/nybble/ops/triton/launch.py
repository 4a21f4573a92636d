"""Launch parameters, computed from the limits of the card at hand."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

WARP_SIZE = 32


@dataclass(frozen=True)
class Card:
    """The limits of a GPU that bear on launch parameters."""

    capability: tuple[int, int]
    max_threads: int  # resident on one multiprocessor
    shared_bytes: int  # shared memory that one program may ask for


# CUDA C++ Programming Guide 13.0, "Technical Specifications per Compute Capability". What kernels are compiled for.
CARDS = (
    Card((7, 5), max_threads=1024, shared_bytes=64 << 10),  # T4, RTX 20
    Card((8, 0), max_threads=2048, shared_bytes=163 << 10),  # A100
    Card((8, 6), max_threads=1536, shared_bytes=99 << 10),  # RTX 30, A10, A40
    Card((8, 9), max_threads=1536, shared_bytes=99 << 10),  # RTX 40, L4, L40
    Card((9, 0), max_threads=2048, shared_bytes=227 << 10),  # H100, H200
    Card((12, 0), max_threads=1536, shared_bytes=99 << 10),  # RTX 50
)


def half_type(card: Card) -> str:
    """Triton's name of the half precision that kernels are compiled for: it has no bf16 on Turing."""
    return "bf16" if card.capability >= (8, 0) else "fp16"


@dataclass(frozen=True)
class Tile:
    """What one program of an elementwise kernel handles, and with how many warps."""

    values: int
    num_warps: int


@dataclass(frozen=True)
class KernelCase:
    """One way in which a kernel is launched, as `scripts/compile_kernels.py` compiles it without a GPU.

    `signature` gives Triton's type of each argument that is not a constant, or those of a tuple; `constants` the rest.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str | tuple[str, ...]]
    constants: dict[str, Any]
    num_warps: int
    options: dict[str, Any] = field(default_factory=dict)


@functools.cache
def card_of(device: torch.device) -> Card:
    """The card behind a CUDA device. Triton's interpreter runs on CPU tensors: it gets the smallest card."""
    if device.type != "cuda":
        return CARDS[0]
    properties = torch.cuda.get_device_properties(device)
    return Card(
        capability=(properties.major, properties.minor),
        max_threads=properties.max_threads_per_multi_processor,
        shared_bytes=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
    )


def elementwise_tile(card: Card, *, bytes_per_value: int, multiple_of: int) -> Tile:
    """The tile of a kernel that streams memory: `multiple_of` (a power of two) values at least.

    Values change threads through shared memory on their way out, so the programs that fill a multiprocessor share it.
    """
    num_warps = 8
    threads = WARP_SIZE * num_warps
    programs = card.max_threads // threads
    fitting = card.shared_bytes // programs // bytes_per_value
    # 16 values a thread: a load of 8 packed bytes, two stores of 16 bytes.
    values = min(16 * threads, 1 << (fitting.bit_length() - 1))
    return Tile(max(values, multiple_of), num_warps)
