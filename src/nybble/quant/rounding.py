"""NF4 codes and scales chosen for the least squared error, in the format that plain rounding fills.

Plain NF4 scales a block by its largest magnitude, so that one value is exact and the others take what levels are left.
A smaller scale clips that value and brings the levels closer to the rest; a negative one turns the levels round, which
are not symmetric. Readers multiply by the scale they find. Each block tries many, the best are rounded as they will
be stored, and only then are codes chosen. Squared error, of plain NF4's: 0.81 on normal weights (0.86 without signs).

Scales of both signs lie around zero, where 8 bits hold them less finely than around their mean. That costs 0.01 of it,
and less than the signs gain wherever the sizes of blocks were tried: equal, or apart by a factor of e^3.

Legend: blocks = ceil(numel / block_size); a tile is (blocks, block_size) in fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.ops.nf4 import absmax_dequantize, absmax_levels, absmax_quantize, by_block, levels, midpoints, pack, tiles
from nybble.quant.format import NF4Spec
from nybble.quant.weight import NF4Weight, require_finite

# Of a block's largest magnitude, for either sign; above 1 it falls on a level inside. Twice as many gain 0.02 of the
# squared error.
FACTORS = (0.65, 0.7, 0.75, 0.8, 0.84, 0.88, 0.92, 0.96, 1.0, 1.04, 1.3, 1.4)
REFINEMENTS = 2  # rounds of "best scale for these codes, best codes for this scale" after the search

# Values searched at a time. On a CPU 2 MiB in fp32, which stay in its cache over all factors. On a GPU 64 MiB, which
# take longer than the launch of a kernel over them; at most three such tensors are held, with importance five.
_TILE_VALUES, _TILE_VALUES_GPU = 1 << 19, 1 << 24
# While scales are compared, levels are looked up by the value in steps of 1/1024: 4 times as fast as finding borders.
_STEPS = 1024


@dataclass(frozen=True)
class StoredAbsmax:
    """Scales as a file holds them (see NF4Weight) and `values`, fp32 (blocks,), as a reader finds them."""

    absmax: Tensor
    group_absmax: Tensor | None
    offset: Tensor | None
    values: Tensor

    @classmethod
    def of(cls, absmax: Tensor, spec: NF4Spec) -> StoredAbsmax:
        """What becomes of fp32 scales (blocks,) under `spec`."""
        if not spec.double_quant:
            return cls(absmax, None, None, absmax)
        codes, group_absmax, offset = absmax_quantize(absmax, spec.group_size)
        values = absmax_dequantize(codes, group_absmax, offset, spec.group_size)
        return cls(codes, group_absmax, offset, values)

    def nearest(self, wanted: Tensor, blocks: slice, spec: NF4Spec) -> tuple[Tensor, Tensor]:
        """What is nearest to scales `wanted` of `blocks`, as stored and as read; the second level stays."""
        if self.group_absmax is None or self.offset is None:
            return wanted, wanted
        table = absmax_levels(wanted.device)
        at = range(len(self.values))[blocks]
        numbers = torch.arange(at.start, at.stop, at.step, device=wanted.device)
        groups = self.group_absmax[numbers // spec.group_size]
        unit = ((wanted - self.offset) / groups).nan_to_num_(0.0)
        codes = torch.bucketize(unit, midpoints(table), out_int32=True)
        return codes.to(torch.uint8), table[codes] * groups + self.offset

    def weight(self, codes: Tensor, shape: tuple[int, ...], spec: NF4Spec) -> NF4Weight:
        """The weight of `shape` whose packed codes were chosen against `values`."""
        return NF4Weight(codes, self.absmax, self.group_absmax, self.offset, shape, spec)


def quantize_searched(weight: Tensor, spec: NF4Spec, *, importance: Tensor | None = None) -> NF4Weight:
    """Quantize a floating-point `weight` of any shape with the scale of each block searched.

    importance: (in,), a weight for the squared error of each input feature, the last dimension; e.g. its mean square.
    Raises UserError if the weight holds NaN or infinity.
    """
    flat = weight.detach().reshape(-1)
    stored = search_stored(flat, spec, importance=importance)
    codes = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=flat.device)
    for values, blocks in _tiles(flat, spec):
        index = nearest_index(by_block(flat[values].float(), spec.block_size), stored.values[blocks, None])
        codes[values.start // 2 : -(-values.stop // 2)] = pack(index.view(-1)[: values.stop - values.start])
    return stored.weight(codes, tuple(weight.shape), spec)


def search_stored(flat: Tensor, spec: NF4Spec, *, importance: Tensor | None = None) -> StoredAbsmax:
    """The scales of a flat weight, searched and then rounded as they are stored.

    Raises UserError if the weight holds NaN or infinity.
    """
    if flat.numel():
        require_finite(torch.stack(flat.aminmax()))
    absmax = torch.empty(spec.num_blocks(flat.numel()), device=flat.device)
    columns = None if importance is None else importance.to(flat.device, torch.float32)
    for values, blocks in _tiles(flat, spec):
        tile = by_block(flat[values].float(), spec.block_size)
        absmax[blocks] = search_absmax(tile, _repeated(columns, values, spec.block_size))
    return StoredAbsmax.of(absmax, spec)


def search_absmax(tile: Tensor, importance: Tensor | None = None) -> Tensor:
    """The scale of each row of `tile`, of either sign, with the least squared error found, fp32 (blocks,).

    It is never worse than the largest magnitude. importance: of the values, broadcast to the tile.
    """
    peak = tile.abs().amax(1)
    best, least = peak, block_errors(tile, peak, importance)
    for factor in FACTORS:
        for absmax in (peak * factor, peak * -factor):
            best, least = _keep_better(tile, importance, absmax, best, least)
    for _ in range(REFINEMENTS):
        best, least = _keep_better(tile, importance, _least_squares(tile, best, importance), best, least)
    return best


def block_errors(tile: Tensor, absmax: Tensor, importance: Tensor | None = None) -> Tensor:
    """Squared error of each row of `tile` under scales (blocks,) of any sign, each value at its nearest level."""
    difference = _near_levels(tile, absmax).mul_(absmax[:, None]).sub_(tile)
    return _sum(difference.square_(), importance)


def nearest_index(values: Tensor, absmax: Tensor) -> Tensor:
    """Index of the level nearest to each of `values`, uint8; absmax is broadcast to them. A scale of 0 gives 0's level.

    A value on a border belongs to the lower level.
    """
    unit = torch.where(absmax == 0, 0.0, values / absmax)
    return torch.bucketize(unit, midpoints(levels(values.device)), out_int32=True).to(torch.uint8)


def _tiles(flat: Tensor, spec: NF4Spec) -> Iterator[tuple[slice, slice]]:
    return tiles(flat.numel(), spec.block_size, _TILE_VALUES_GPU if flat.device.type == "cuda" else _TILE_VALUES)


def _keep_better(
    tile: Tensor, importance: Tensor | None, absmax: Tensor, best: Tensor, least: Tensor
) -> tuple[Tensor, Tensor]:
    errors = block_errors(tile, absmax, importance)
    return torch.where(errors < least, absmax, best), torch.minimum(errors, least)


def _least_squares(tile: Tensor, absmax: Tensor, importance: Tensor | None) -> Tensor:
    """The best scale for the codes that `absmax` gives; 0 for a block of zeros."""
    level = _near_levels(tile, absmax)
    return (_sum(level * tile, importance) / _sum(level.square(), importance)).nan_to_num_(0.0, posinf=0.0, neginf=0.0)


def _near_levels(tile: Tensor, absmax: Tensor) -> Tensor:
    table = _level_table(tile.device)
    steps = torch.where(absmax == 0, 0.0, _STEPS / absmax)
    index = (tile * steps[:, None]).add_(_STEPS + 0.5).clamp_(0, 2 * _STEPS).int()
    return table.index_select(0, index.view(-1)).view_as(tile)


@functools.cache
def _level_table(device: torch.device) -> Tensor:
    """The level nearest to each of -1, -1 + 1/1024, ..., 1."""
    steps = torch.arange(-_STEPS, _STEPS + 1, device=device) / _STEPS
    return levels(device)[torch.bucketize(steps, midpoints(levels(device)))]


def _sum(terms: Tensor, importance: Tensor | None) -> Tensor:
    return terms.sum(1) if importance is None else (terms * importance).sum(1)


def _repeated(columns: Tensor | None, values: slice, block_size: int) -> Tensor | None:
    """The importance of a tile's values, each that of the feature which it multiplies."""
    if columns is None:
        return None
    blocks = -(-(values.stop - values.start) // block_size)
    start = values.start % columns.numel()
    index = torch.arange(start, start + blocks * block_size, dtype=torch.int32, device=columns.device)
    return columns.index_select(0, index.remainder_(columns.numel())).view(-1, block_size)
