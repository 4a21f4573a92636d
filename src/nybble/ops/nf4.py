"""NF4 quantization (QLoRA, arXiv 2305.14314), byte for byte as bitsandbytes computes it.

A tensor is read in row-major order, whatever its shape, in blocks of `block_size` values; the last block may be short.
Legend: numel = number of weights, blocks = ceil(numel / block_size), groups = ceil(blocks / group_size).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nybble.ops import triton

# The 16 levels: quantiles of a standard normal, scaled to [-1, 1], with an exact zero (QLoRA, appendix E).
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# Values a pass of the reference handles: 16 MiB in fp32, so that a large weight needs no fp32 copy of itself.
_CHUNK_VALUES = 1 << 22


@functools.cache
def levels(device: torch.device) -> Tensor:
    """The 16 NF4 levels, fp32."""
    return torch.tensor(LEVELS, dtype=torch.float32, device=device)


@functools.cache
def absmax_levels(device: torch.device) -> Tensor:
    """The 256 levels of the signed dynamic 8-bit map (arXiv 1511.04561), sorted, fp32.

    Six decades below one; the i-th holds 2**i evenly spaced values a sign, so that precision grows with magnitude.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def midpoints(table: Tensor) -> Tensor:
    """The borders between neighbouring levels; a value on a border belongs to the lower level."""
    return (table[:-1] + table[1:]) / 2


@torch.library.custom_op("nybble::nf4_quantize", mutates_args=())
def nf4_quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize a floating-point tensor of any shape to 4 bits a value.

    Returns codes, uint8 (ceil(numel / 2),), the even element of a pair in the high bits, and absmax, fp32 (blocks,).
    """
    flat = weight.reshape(-1)
    codes, absmax = _empty_quantized(flat, block_size)
    borders = midpoints(levels(flat.device))
    for values, blocks in tiles(flat.numel(), block_size, _CHUNK_VALUES):
        tile = by_block(flat[values].float(), block_size)
        peak = tile.abs().amax(1)
        absmax[blocks] = peak
        # The reciprocal is rounded before the product, as bitsandbytes does. A block of zeros gives 0 * inf: take 0.
        unit = torch.mul(tile, peak.reciprocal()[:, None]).nan_to_num_(0.0)
        index = torch.bucketize(unit, borders, out_int32=True).to(torch.uint8).view(-1)
        codes[values.start // 2 : -(-values.stop // 2)] = pack(index[: values.stop - values.start])
    return codes, absmax


@nf4_quantize.register_fake
def _(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return _empty_quantized(weight, block_size)


@torch.library.custom_op("nybble::absmax_quantize", mutates_args=())
def absmax_quantize(absmax: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize fp32 absmax (blocks,) to 8 bits in groups: the second level of double quantization.

    Returns codes, uint8 (blocks,), group_absmax, fp32 (groups,), and offset, fp32 (1,): the mean of absmax.
    """
    offset = absmax.mean().reshape(1) if absmax.numel() else absmax.new_zeros(1)
    tile = by_block(absmax - offset, group_size)
    group_absmax = tile.abs().amax(1)
    unit = torch.mul(tile, group_absmax.reciprocal()[:, None]).nan_to_num_(0.0)
    codes = torch.bucketize(unit, midpoints(absmax_levels(absmax.device)), out_int32=True).to(torch.uint8)
    return codes.view(-1)[: absmax.numel()].clone(), group_absmax, offset


@absmax_quantize.register_fake
def _(absmax: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    groups = -(-absmax.numel() // group_size)
    codes = torch.empty_like(absmax, dtype=torch.uint8)
    return codes, absmax.new_empty(groups), absmax.new_empty(1)


@torch.library.custom_op("nybble::absmax_dequantize", mutates_args=())
def absmax_dequantize(codes: Tensor, group_absmax: Tensor, offset: Tensor, group_size: int) -> Tensor:
    """Undo `absmax_quantize`: fp32 (blocks,)."""
    values = absmax_levels(codes.device)[codes.int()]
    scaled = by_block(values, group_size).mul_(group_absmax[:, None]).view(-1)[: codes.numel()]
    return scaled + offset


@absmax_dequantize.register_fake
def _(codes: Tensor, group_absmax: Tensor, offset: Tensor, group_size: int) -> Tensor:  # noqa: ARG001
    return torch.empty_like(codes, dtype=torch.float32)


@torch.library.custom_op("nybble::nf4_dequantize", mutates_args=())
def nf4_dequantize(
    codes: Tensor,
    absmax: Tensor,
    group_absmax: Tensor | None,
    offset: Tensor | None,
    *,
    block_size: int,
    group_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Rebuild a weight of `shape` in `dtype`: level * absmax in fp32, rounded once.

    absmax is fp32 (blocks,), or its 8-bit codes together with `group_absmax` and `offset` of `absmax_quantize`.
    """
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    _dequantize(out.view(-1), codes, absmax, group_absmax, offset, block_size=block_size, group_size=group_size)
    return out


@torch.library.custom_op("nybble::nf4_dequantize_stack_", mutates_args=("out",))
def nf4_dequantize_stack_(
    out: Tensor,
    sizes: list[int],
    codes: list[Tensor],
    absmax: list[Tensor],
    group_absmax: list[Tensor],
    offset: list[Tensor],
    *,
    block_size: int,
    group_size: int,
) -> None:
    """`nf4_dequantize` of several weights, of `sizes` values, one behind the other into `out`, contiguous.

    Lists have an item a weight; group_absmax and offset are empty without double quantization (group_size 0).
    """
    for i, part in enumerate(torch.split(out.view(-1), sizes)):
        second_level = (group_absmax[i], offset[i]) if group_size else (None, None)
        _dequantize(part, codes[i], absmax[i], *second_level, block_size=block_size, group_size=group_size)


@nf4_dequantize_stack_.register_fake
def _(out: Tensor, sizes: list[int], *stored: list[Tensor], block_size: int, group_size: int) -> None:
    pass


def _dequantize(
    flat: Tensor,
    codes: Tensor,
    absmax: Tensor,
    group_absmax: Tensor | None,
    offset: Tensor | None,
    *,
    block_size: int,
    group_size: int,
) -> None:
    if group_absmax is not None:
        assert offset is not None
        absmax = absmax_dequantize(absmax, group_absmax, offset, group_size)
    flat_codes = codes.reshape(-1)
    pairs = _level_pairs(codes.device)
    for values, blocks in tiles(flat.numel(), block_size, _CHUNK_VALUES):
        count = values.stop - values.start
        packed = flat_codes[values.start // 2 : -(-values.stop // 2)].int()
        unit = pairs.index_select(0, packed).view(torch.float32)[:count]
        flat[values] = by_block(unit, block_size).mul_(absmax[blocks, None]).view(-1)[:count]


@nf4_dequantize.register_fake
def _(
    codes: Tensor,
    absmax: Tensor,  # noqa: ARG001
    group_absmax: Tensor | None,  # noqa: ARG001
    offset: Tensor | None,  # noqa: ARG001
    *,
    block_size: int,  # noqa: ARG001
    group_size: int,  # noqa: ARG001
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=codes.device)


if triton.available():

    @nf4_quantize.register_kernel("cuda")
    def _(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        from nybble.ops.triton import nf4 as kernels

        return kernels.quantize(weight, block_size)

    @nf4_dequantize.register_kernel("cuda")
    def _(codes: Tensor, *stored: Any, shape: Sequence[int], dtype: torch.dtype, **options: Any) -> Tensor:
        from nybble.ops.triton import nf4 as kernels

        out = torch.empty(shape, dtype=dtype, device=codes.device)
        kernels.dequantize(out, codes, *stored, **options)
        return out

    @nf4_dequantize_stack_.register_kernel("cuda")
    def _(out: Tensor, *stored: Any, **options: Any) -> None:
        from nybble.ops.triton import nf4 as kernels

        kernels.dequantize_stack(out, *stored, **options)


@functools.cache
def _level_pairs(device: torch.device) -> Tensor:
    """Both levels of each byte as one 8-byte item, (256,): a look-up a byte instead of one a nibble."""
    table = levels(torch.device("cpu"))
    byte = torch.arange(256, device="cpu")
    pairs = torch.stack([table[byte >> 4], table[byte & 15]], dim=1)
    return pairs.view(torch.float64).view(-1).to(device)


def _empty_quantized(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    numel = weight.numel()
    codes = weight.new_empty((numel + 1) // 2, dtype=torch.uint8)
    return codes, weight.new_empty(-(-numel // block_size), dtype=torch.float32)


def tiles(numel: int, block_size: int, most_values: int) -> Iterator[tuple[slice, slice]]:
    """The values of each tile in a flat weight, whole blocks of `most_values` or a single one, and its blocks."""
    step = max(most_values // block_size, 1) * block_size
    for start in range(0, numel, step):
        stop = min(start + step, numel)
        yield slice(start, stop), slice(start // block_size, -(-stop // block_size))


def by_block(flat: Tensor, block_size: int) -> Tensor:
    """View a flat tensor as (blocks, block_size); a short last block is filled up with zeros, in a copy."""
    missing = -flat.numel() % block_size
    if missing:
        flat = torch.nn.functional.pad(flat, (0, missing))
    return flat.view(-1, block_size)


def pack(index: Tensor, zero: int = 7) -> Tensor:
    """Level indices (numel,) two a byte, the even element in the high bits.

    zero: index of the level 0, which stands beside an odd last one.
    """
    if index.numel() % 2:
        index = torch.nn.functional.pad(index, (0, 1), value=zero)
    pairs = index.view(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]
