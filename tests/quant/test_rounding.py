"""Searched scales: less error in the same bytes, chosen against what a reader finds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble.errors import UserError
from nybble.ops.nf4 import levels, pack
from nybble.quant.format import NF4Spec
from nybble.quant.rounding import block_errors, nearest_index, quantize_searched, search_absmax
from nybble.quant.weight import NF4Weight

SPECS = [NF4Spec(64, 256), NF4Spec(64, 0), NF4Spec(128, 256)]


def squared_error(weight: Tensor, quantized: NF4Weight, importance: Tensor | float = 1.0) -> float:
    return float(((quantized.dequantize(torch.float32) - weight.float()).square() * importance).sum())


def best_codes(weight: Tensor, quantized: NF4Weight) -> Tensor:
    """The level nearest to each value under the scales that are read, by trying all 16."""
    absmax = quantized.single_level().absmax.repeat_interleave(quantized.spec.block_size)[: weight.numel()]
    candidates = levels(weight.device) * absmax[:, None]
    return (candidates - weight.reshape(-1, 1).float()).abs().argmin(1)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(256, 256), (96, 80), (3, 33), (7,)])
def test_the_error_is_less_than_plain_roundings(spec: NF4Spec, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    plain, searched = NF4Weight.quantize(weight, spec), quantize_searched(weight, spec)
    assert [tensor.dtype for tensor in searched.tensors] == [tensor.dtype for tensor in plain.tensors]
    assert [tensor.shape for tensor in searched.tensors] == [tensor.shape for tensor in plain.tensors]
    assert squared_error(weight, searched) < squared_error(weight, plain)


def test_normal_weights_gain_a_sixth() -> None:
    weight = torch.randn(1024, 1024)
    gain = squared_error(weight, quantize_searched(weight, NF4Spec())) / squared_error(
        weight, NF4Weight.quantize(weight, NF4Spec())
    )
    assert 0.75 < gain < 0.83


@pytest.mark.parametrize("spec", SPECS)
def test_codes_are_the_nearest_under_the_scales_that_are_read(spec: NF4Spec) -> None:
    weight = torch.randn(64, 256)
    searched = quantize_searched(weight, spec)
    assert torch.equal(searched.codes, pack(best_codes(weight, searched).to(torch.uint8)))


def test_scales_take_both_signs() -> None:
    signs = quantize_searched(torch.randn(512, 256), NF4Spec()).single_level().absmax.sign()
    assert 0.3 < float((signs < 0).float().mean()) < 0.7


def test_the_search_comes_near_the_best_of_all_scales() -> None:
    tile = torch.randn(200, 64)
    every = torch.stack([block_errors(tile, tile.abs().amax(1) * step / 200) for step in range(-300, 300)])
    found = block_errors(tile, search_absmax(tile))
    assert float(found.sum()) < 1.03 * float(every.amin(0).sum())
    assert bool((found <= block_errors(tile, tile.abs().amax(1))).all())


def test_importance_moves_the_error_to_features_that_matter_less() -> None:
    weight, importance = torch.randn(128, 200), torch.rand(200) ** 4  # 200: blocks cross the ends of rows
    plain, weighted = (quantize_searched(weight, NF4Spec(), importance=given) for given in (None, importance))
    assert squared_error(weight, weighted, importance) < 0.95 * squared_error(weight, plain, importance)
    assert squared_error(weight, weighted) > squared_error(weight, plain)


def test_equal_importance_changes_nothing() -> None:
    weight = torch.randn(64, 128)
    plain, weighted = (quantize_searched(weight, NF4Spec(), importance=given) for given in (None, torch.ones(128)))
    assert all(torch.equal(one, other) for one, other in zip(plain.tensors, weighted.tensors, strict=True))


def test_tiles_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = torch.randn(100, 72), torch.rand(72)
    whole = quantize_searched(weight, NF4Spec(), importance=importance)
    monkeypatch.setattr("nybble.quant.rounding._TILE_VALUES", 256)
    parts = quantize_searched(weight, NF4Spec(), importance=importance)
    assert all(torch.equal(one, other) for one, other in zip(whole.tensors, parts.tensors, strict=True))


@pytest.mark.parametrize("spec", SPECS)
def test_blocks_of_zeros(spec: NF4Spec) -> None:
    weight = torch.randn(8, 256)
    weight[2:5] = 0
    assert torch.equal(quantize_searched(weight, spec).dequantize(torch.float32)[2:5] == 0, torch.ones(3, 256) > 0)
    nothing = quantize_searched(torch.zeros(4, 64), spec)
    assert not nothing.dequantize(torch.float32).any()
    assert quantize_searched(torch.empty(0, 64), spec).numel == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value: float) -> None:
    weight = torch.randn(4, 64)
    weight[1, 3] = value
    with pytest.raises(UserError, match="NaN or infinite"):
        quantize_searched(weight, NF4Spec())


def test_values_further_apart_than_fp16_reaches() -> None:
    weight = torch.tensor([[40000.0, -40000.0] * 32]).half()
    assert torch.equal(quantize_searched(weight, NF4Spec(64, 0)).dequantize(torch.float16), weight)


def test_a_negative_scale_turns_the_levels_round() -> None:
    values = torch.tensor([1.0, -1.0, 0.05, 0.0])
    assert nearest_index(values, torch.tensor([-1.0])).tolist() == [0, 15, 6, 7]
    assert nearest_index(values, torch.tensor([0.0])).tolist() == [7, 7, 7, 7]


def test_16_bit_weights() -> None:
    weight = torch.randn(64, 128).bfloat16()
    one, other = quantize_searched(weight, NF4Spec()), quantize_searched(weight.float(), NF4Spec())
    assert all(torch.equal(left, right) for left, right in zip(one.tensors, other.tensors, strict=True))
