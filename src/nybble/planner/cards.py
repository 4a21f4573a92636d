"""Cards by name: how much memory they have and how fast they are.

The rates of H100 and H200 are measured, by `benchmarks/`. Others are the data sheet's, times what the H100 reached of
its own: dense bf16 products 735 of 989 TFLOP/s (0.74), fp8 ones 1,300 of 1,979 (0.66), kernels 2,850 of 3,350 GB/s
(0.85), PCIe 54 of 64 GB/s (0.84). Of consumer cards the rate of products that are summed in fp32.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from nybble.errors import UserError, did_you_mean

GIB = 2**30

# Of the data sheet's rates, what kernels reach.
_BF16, _FP8, _MEMORY, _LINK = 0.74, 0.66, 0.85, 0.84
# What shows in use beside the allocator, with CUDA 13: context, libraries and kernels 0.82 GiB on an H200, with CUDA
# graphs or without, of which the context grows with the chip. What the allocator holds beside the pool of a graph: 0.06
# to 0.29 GiB in open settings, 0.19 in the middle.
_CONTEXT_BYTES, _GRAPH_BYTES = 840 * 2**20, 192 * 2**20
_CONTEXT_BYTES_A_MULTIPROCESSOR = 3 * 2**20

_MAKERS = ("nvidia", "geforce", "tesla", "rtx")
# What has a card's name and not its rates: for laptops (`Max-Q` too), and a slice of a card.
_CUT_DOWN = {"laptop", "max", "mig"}
_ENDLESS_BYTES = 2**50
_SIZE = re.compile(r"\b(\d+)\s*gb\b", re.IGNORECASE)


@dataclass(frozen=True)
class DeviceSpec:
    """A card and its host. Rates are those that kernels reach, a second. fp8_flops: 0 where there is no fp8.

    context_bytes: what CUDA and its libraries hold beside the allocator; graph_bytes: what that holds beside a
    graph. host_bytes: of memory that may be pinned.
    """

    name: str
    memory_bytes: int
    bf16_flops: float
    fp8_flops: float
    bandwidth: float  # bytes/s of device memory
    link: float  # bytes/s from host to device
    capability: tuple[int, int]
    multiprocessors: int = 132
    context_bytes: int = _CONTEXT_BYTES
    graph_bytes: int = _GRAPH_BYTES
    host_bytes: int = 64 * GIB
    disk: float = 3e9  # bytes/s of files that are mapped
    launch_s: float = 7e-6  # of one kernel from Python

    def with_memory(self, memory_bytes: int) -> DeviceSpec:
        return replace(self, memory_bytes=memory_bytes)

    def with_host(self, host_bytes: int) -> DeviceSpec:
        return replace(self, host_bytes=host_bytes)


def card(name: str) -> DeviceSpec:
    """A known card by its name, like `h100`, `rtx 4090` or `a100 40gb`; raises UserError with the nearest name.

    Of one that comes in several sizes, without one in the name, the largest.
    """
    size = _SIZE.search(name)
    if found := _named(name, int(size[1]) * GIB if size else _ENDLESS_BYTES):
        return found
    guess = did_you_mean(_key(name), [_key(known.name) for known in CARDS])
    hint = f"Did you mean {guess!r}?" if guess else f"Known: {', '.join(known.name for known in CARDS)}."
    raise UserError(f"no card is known as {name!r}", where="--gpu", fix=hint)


def card_of_device(product: str, memory_bytes: int, capability: tuple[int, int]) -> DeviceSpec:
    """The card whose name is in `product`, as a driver gives it, with its real memory; else one like it."""
    like = _named(product, memory_bytes) or _like(memory_bytes, capability)
    return replace(like, name=product, memory_bytes=memory_bytes, capability=capability)


def card_of_memory(memory_bytes: int) -> DeviceSpec:
    """A card of so much memory: the slowest known that has as much, so that no speed is promised in vain."""
    return replace(_like(memory_bytes, (8, 6)), memory_bytes=memory_bytes)


def _like(memory_bytes: int, capability: tuple[int, int]) -> DeviceSpec:
    newer = [card for card in CARDS if card.capability >= capability]
    large = [card for card in newer if card.memory_bytes >= 0.95 * memory_bytes] or [max(newer, key=_memory)]
    least = min(map(_memory, large))
    return min((card for card in large if card.memory_bytes < 1.2 * least), key=lambda card: card.bf16_flops)


def _memory(card: DeviceSpec) -> int:
    return card.memory_bytes


def _named(product: str, memory_bytes: int) -> DeviceSpec | None:
    """The card whose name stands in `product` in whole words: an `l40` is no L4.

    The longest such name, as a `4060 ti` is no 4060; of one that comes in several sizes the one nearest to
    `memory_bytes`.
    """
    key = _key(product)
    if _CUT_DOWN.intersection(key.split()):
        return None
    found = [known for known in CARDS if f" {_key(known.name)} " in f" {key} "]
    return max(found, key=lambda known: (len(_key(known.name)), -abs(known.memory_bytes - memory_bytes)), default=None)


def _key(name: str) -> str:
    """Its words, without the maker's and without the size of its memory: `NVIDIA A100-SXM4-40GB` -> `a100 sxm4`."""
    words = _SIZE.sub(" ", name.lower()).replace("-", " ").split()
    return " ".join(word for word in words if word not in _MAKERS)


@dataclass(frozen=True)
class _Sheet:
    """Of a data sheet: GiB that the driver shows, dense TFLOP/s in bf16 and fp8, GB/s of memory and of the link."""

    name: str
    gib: float
    bf16: float
    fp8: float
    bandwidth: float
    link: float
    capability: tuple[int, int]
    multiprocessors: int

    @property
    def spec(self) -> DeviceSpec:
        return DeviceSpec(
            self.name,
            int(self.gib * GIB),
            self.bf16 * 1e12 * _BF16,
            self.fp8 * 1e12 * _FP8,
            self.bandwidth * 1e9 * _MEMORY,
            self.link * 1e9 * _LINK,
            self.capability,
            self.multiprocessors,
            _CONTEXT_BYTES - _CONTEXT_BYTES_A_MULTIPROCESSOR * max(0, 132 - self.multiprocessors),
        )


_SHEETS = (
    _Sheet("RTX 3060 12GB", 11.65, 25.6, 0, 360, 32, (8, 6), 28),
    _Sheet("RTX 3070", 7.65, 40.6, 0, 448, 32, (8, 6), 46),
    _Sheet("RTX 3080", 9.65, 59.5, 0, 760, 32, (8, 6), 68),
    _Sheet("RTX 3090", 23.6, 71, 0, 936, 32, (8, 6), 82),
    _Sheet("RTX 4060", 7.65, 30.2, 60.5, 272, 16, (8, 9), 24),
    _Sheet("RTX 4060 Ti 16GB", 15.6, 44.1, 88.3, 288, 16, (8, 9), 34),
    _Sheet("RTX 4070", 11.6, 58.3, 116.6, 504, 32, (8, 9), 46),
    _Sheet("RTX 4080", 15.6, 97.5, 194.9, 717, 32, (8, 9), 76),
    _Sheet("RTX 4090", 23.5, 165, 330, 1008, 32, (8, 9), 128),
    _Sheet("RTX 5060 Ti 16GB", 15.5, 47.4, 94.9, 448, 32, (12, 0), 36),
    _Sheet("RTX 5070", 11.6, 61.7, 123.5, 672, 64, (12, 0), 48),
    _Sheet("RTX 5080", 15.5, 112.6, 225.1, 960, 64, (12, 0), 84),
    _Sheet("RTX 5090", 31.3, 210, 419, 1792, 64, (12, 0), 170),
    _Sheet("T4", 14.6, 65, 0, 300, 16, (7, 5), 40),
    _Sheet("V100", 31.7, 112, 0, 900, 16, (7, 0), 80),
    _Sheet("A10", 22.1, 125, 0, 600, 32, (8, 6), 72),
    _Sheet("A40", 44.4, 150, 0, 696, 32, (8, 6), 84),
    _Sheet("A6000", 47.4, 155, 0, 768, 32, (8, 6), 84),
    _Sheet("A100 40GB", 39.4, 312, 0, 1555, 32, (8, 0), 108),
    _Sheet("A100", 79.1, 312, 0, 2039, 32, (8, 0), 108),
    _Sheet("L4", 22.0, 121, 242, 300, 32, (8, 9), 58),
    _Sheet("L40", 44.4, 181, 362, 864, 32, (8, 9), 142),
    _Sheet("L40S", 44.4, 362, 733, 864, 32, (8, 9), 142),
    _Sheet("6000 Ada", 47.4, 364, 728, 960, 32, (8, 9), 142),
    _Sheet("PRO 6000 Blackwell", 94.9, 503, 1007, 1792, 64, (12, 0), 188),
    _Sheet("B200", 178.0, 2250, 4500, 8000, 64, (10, 0), 148),
)
_MEASURED = (
    DeviceSpec("H100", int(79.2 * GIB), 735e12, 1300e12, 2850e9, 53.7e9, (9, 0), 132),
    DeviceSpec("H200", int(139.8 * GIB), 715e12, 1230e12, 3700e9, 53.7e9, (9, 0), 132),
)
CARDS = (*(sheet.spec for sheet in _SHEETS), *_MEASURED)
