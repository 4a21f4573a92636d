"""Cards by name: how much memory they have and how fast they are.

The H100's rates are measured, by `benchmarks/`. Others are the data sheet's, times what the H100 reached of its own:
dense bf16 products 710 of 989 TFLOP/s (0.72), fp8 ones 1,300 of 1,979 (0.66), copies 2,700 of 3,350 GB/s (0.80, by our
kernels), PCIe 54 of 64 GB/s (0.84). Consumer cards sum bf16 products in fp32 at the rate given here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nybble.errors import UserError, did_you_mean

GIB = 2**30

# Of the data sheet's rates, what kernels reach.
_BF16, _FP8, _MEMORY, _LINK = 0.72, 0.66, 0.80, 0.84
# CUDA's context with the kernels that a run loads: 0.5 GiB on an H100 under CUDA 13, less on smaller chips.
_CONTEXT_BYTES = 540 * 2**20


@dataclass(frozen=True)
class DeviceSpec:
    """A card and its host. Rates are those that kernels reach, a second. fp8_flops: 0 where there is no fp8.

    context_bytes: what CUDA and its libraries hold beside the allocator. host_bytes: of memory that may be pinned.
    multiprocessors: of which some workspaces depend.
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
    host_bytes: int = 64 * GIB
    launch_s: float = 7e-6  # of one kernel from Python

    def with_memory(self, memory_bytes: int) -> DeviceSpec:
        return replace(self, memory_bytes=memory_bytes)

    def with_host(self, host_bytes: int) -> DeviceSpec:
        return replace(self, host_bytes=host_bytes)


def card(name: str) -> DeviceSpec:
    """A known card by its name, like `h100` or `rtx 4090`; raises UserError with the nearest name."""
    key = _key(name)
    if key in CARDS:
        return CARDS[key]
    guess = did_you_mean(key, list(CARDS))
    hint = f"Did you mean {guess!r}?" if guess else f"Known: {', '.join(CARDS)}."
    raise UserError(f"no card is known as {name!r}", where="--gpu", fix=hint)


def card_of_device(product: str, memory_bytes: int, capability: tuple[int, int]) -> DeviceSpec:
    """The card whose name is in `product`, as a driver gives it, with its real memory; else one like it."""
    key = _key(product)
    known = [name for name in CARDS if name in key]
    like = CARDS[max(known, key=len)] if known else _like(memory_bytes, capability)
    return replace(like, name=product, memory_bytes=memory_bytes, capability=capability)


def card_of_memory(memory_bytes: int) -> DeviceSpec:
    """A card of so much memory: the slowest known that has as much, so that no speed is promised in vain."""
    return replace(_like(memory_bytes, (8, 6)), memory_bytes=memory_bytes)


def _like(memory_bytes: int, capability: tuple[int, int]) -> DeviceSpec:
    large = [card for card in CARDS.values() if card.memory_bytes >= 0.95 * memory_bytes] or list(CARDS.values())
    fitting = [card for card in large if card.capability >= capability] or large
    return min(fitting, key=lambda card: (card.memory_bytes, card.bf16_flops))


def _key(name: str) -> str:
    dropped = ("nvidia", "geforce", "tesla", "laptop gpu")
    key = name.lower()
    for word in dropped:
        key = key.replace(word, "")
    return key.replace("-", " ").replace("rtx", "").replace("gb", "").strip().replace("  ", " ")


def _sheet(
    name: str, gib: float, bf16: float, fp8: float, bandwidth: float, link: float, capability: tuple[int, int]
) -> tuple[str, DeviceSpec]:
    """From a data sheet: GiB that the driver shows, dense TFLOP/s, GB/s of memory and of the link."""
    spec = DeviceSpec(
        name,
        int(gib * GIB),
        bf16 * 1e12 * _BF16,
        fp8 * 1e12 * _FP8,
        bandwidth * 1e9 * _MEMORY,
        link * 1e9 * _LINK,
        capability,
    )
    return _key(name), spec


CARDS: dict[str, DeviceSpec] = dict(
    [
        _sheet("RTX 3060 12GB", 11.65, 51, 0, 360, 32, (8, 6)),
        _sheet("RTX 3070", 7.65, 81, 0, 448, 32, (8, 6)),
        _sheet("RTX 3080", 9.65, 119, 0, 760, 32, (8, 6)),
        _sheet("RTX 3090", 23.6, 71, 0, 936, 32, (8, 6)),
        _sheet("RTX 4060", 7.65, 60, 121, 272, 16, (8, 9)),
        _sheet("RTX 4060 Ti 16GB", 15.6, 88, 177, 288, 16, (8, 9)),
        _sheet("RTX 4070", 11.6, 117, 233, 504, 32, (8, 9)),
        _sheet("RTX 4080", 15.6, 195, 390, 717, 32, (8, 9)),
        _sheet("RTX 4090", 23.5, 165, 330, 1008, 32, (8, 9)),
        _sheet("RTX 5060 Ti 16GB", 15.5, 95, 190, 448, 32, (12, 0)),
        _sheet("RTX 5070", 11.6, 123, 247, 672, 64, (12, 0)),
        _sheet("RTX 5080", 15.5, 225, 450, 960, 64, (12, 0)),
        _sheet("RTX 5090", 31.3, 210, 419, 1792, 64, (12, 0)),
        _sheet("T4", 14.6, 65, 0, 300, 16, (7, 5)),
        _sheet("V100", 31.7, 112, 0, 900, 16, (7, 0)),
        _sheet("A10", 22.1, 125, 0, 600, 32, (8, 6)),
        _sheet("A40", 44.4, 150, 0, 696, 32, (8, 6)),
        _sheet("A6000", 47.4, 155, 0, 768, 32, (8, 6)),
        _sheet("A100 40GB", 39.4, 312, 0, 1555, 32, (8, 0)),
        _sheet("A100", 79.1, 312, 0, 2039, 32, (8, 0)),
        _sheet("L4", 22.0, 121, 242, 300, 32, (8, 9)),
        _sheet("L40S", 44.4, 362, 733, 864, 32, (8, 9)),
        _sheet("6000 Ada", 47.4, 364, 728, 960, 32, (8, 9)),
        _sheet("B200", 178.0, 2250, 4500, 8000, 64, (10, 0)),
        _sheet("PRO 6000 Blackwell", 94.9, 503, 1007, 1792, 64, (12, 0)),
        _sheet("H200", 139.8, 989, 1979, 4800, 64, (9, 0)),
        # Measured (benchmarks/results/kernels.txt).
        ("h100", DeviceSpec("H100", int(79.2 * GIB), 710e12, 1300e12, 2700e9, 53.7e9, (9, 0))),
    ]
)
