"""FP4 against bitsandbytes' bytes, INT4 against its definition, all formats against one another."""

from __future__ import annotations

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import pytest
import safetensors.torch
import torch
from torch import Tensor

from nybble.errors import UserError
from nybble.quant.bnb import fp4_from_bnb, to_bnb
from nybble.quant.format import NF4Spec
from nybble.quant.four_bit import FORMATS, FP4, INT4, NF4, FourBitFormat, FourBitWeight
from nybble.quant.weight import NF4Weight

NAME = "model.layers.0.mlp.up_proj.weight"
SPECS = [NF4Spec(), NF4Spec(group_size=0), NF4Spec(block_size=128)]
SHAPES = [(48, 96), (40, 33), (3, 5)]
EVERY = pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))


def codes(packed: Tensor) -> Tensor:
    flat = packed.view(-1)
    return torch.stack([flat >> 4, flat & 15], dim=1).view(-1)


def their_fp4(weight: Tensor, spec: NF4Spec) -> dict[str, Tensor]:
    packed, state = bnb_functional.quantize_4bit(
        weight, blocksize=spec.block_size, compress_statistics=spec.double_quant, quant_type="fp4"
    )
    return {NAME: packed} | {f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}


def test_fp4_levels_are_theirs() -> None:
    assert torch.equal(FP4.table("cpu"), bnb_functional.get_4bit_type("fp4", device="cpu"))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp4_codes_are_theirs(spec: NF4Spec, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    theirs, ours = their_fp4(weight, spec), FourBitWeight.quantize(weight, spec, FP4)
    found, expected = codes(ours.codes), codes(theirs[NAME])
    # Code 8 is -0: their CPU build writes it for small positive values, their CUDA build for small negative ones.
    found, expected = found.where(found != 8, 0), expected.where(expected != 8, 0)
    # Their CPU build rounds the levels to four digits before it finds the borders.
    blocks = torch.nn.functional.pad(weight.view(-1), (0, -weight.numel() % spec.block_size)).view(-1, spec.block_size)
    unit = (blocks / blocks.abs().amax(1, keepdim=True)).view(-1)[: weight.numel()].abs()
    magnitudes = FP4.table("cpu")[:8].sort().values
    from_border = (unit[:, None] - (magnitudes[1:] + magnitudes[:-1]) / 2).abs().amin(1)
    same = (found == expected)[: weight.numel()]
    assert same[from_border > 1e-4].all()
    assert same.float().mean() > 0.99


def test_fp4_values_on_a_border_take_the_smaller_level_and_keep_their_sign() -> None:
    unit = torch.tensor([0.0859375, -0.0859375, 0.001, -0.001, 0.0, 1.0, -1.0])
    assert FP4.nearest(unit).tolist() == [1, 9, 0, 8, 0, 3, 11]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp4_of_theirs_reads_and_writes_the_same_bytes(spec: NF4Spec, shape: tuple[int, int]) -> None:
    theirs = their_fp4(torch.randn(shape, dtype=torch.bfloat16), spec)
    ours = to_bnb(NAME, fp4_from_bnb(NAME, theirs), torch.bfloat16)
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_bitsandbytes_loads_our_fp4(spec: NF4Spec) -> None:
    weight = FourBitWeight.quantize(torch.randn(48, 128), spec, FP4)
    tensors = safetensors.torch.load(safetensors.torch.save(to_bnb(NAME, weight, torch.float32)))
    state = {key.removeprefix(NAME + "."): value for key, value in tensors.items() if key != NAME}
    parameter = bnb.nn.Params4bit.from_prequantized(tensors[NAME], state, device="cpu")
    found = bnb_functional.dequantize_4bit(parameter.data, parameter.quant_state)
    torch.testing.assert_close(found, weight.dequantize(torch.float32), rtol=2e-7, atol=0)


def test_fp4_that_is_not_there_or_not_whole() -> None:
    with pytest.raises(UserError, match="not in bitsandbytes' FP4"):
        fp4_from_bnb(NAME, to_bnb(NAME, NF4Weight.quantize(torch.randn(8, 64), NF4Spec()), torch.bfloat16))
    tensors = their_fp4(torch.randn(8, 64), NF4Spec())
    tensors[f"{NAME}.quant_map"] = NF4.table("cpu")
    with pytest.raises(UserError, match="quant_map does not hold the standard levels"):
        fp4_from_bnb(NAME, tensors)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_is_that_of_nf4_weight(spec: NF4Spec, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, dtype=torch.bfloat16)
    found, expected = FourBitWeight.quantize(weight, spec, NF4), NF4Weight.quantize(weight, spec)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.absmax, expected.absmax)
    assert torch.equal(found.dequantize(torch.float32), expected.dequantize(torch.float32))
    assert found.bits_per_weight == expected.bits_per_weight


def test_int4_is_rounding_to_a_seventh_of_the_largest_magnitude() -> None:
    weight = torch.randn(6, 64)
    found = FourBitWeight.quantize(weight, NF4Spec(group_size=0), INT4).dequantize(torch.float32)
    step = weight.abs().amax(1, keepdim=True) / 7
    torch.testing.assert_close(found, (weight / step).round() * step)


@EVERY
def test_every_value_is_at_its_nearest_level(format: FourBitFormat) -> None:
    unit = torch.rand(1000) * 2 - 1
    table = format.table("cpu")
    nearest = (unit[:, None] - table).abs().amin(1)
    torch.testing.assert_close((unit - table[format.nearest(unit).int()]).abs(), nearest, rtol=0, atol=2e-7)


@EVERY
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_zeros_stay_zeros_and_odd_shapes_fit(format: FourBitFormat, spec: NF4Spec) -> None:
    zeros = FourBitWeight.quantize(torch.zeros(7, 33), NF4Spec(spec.block_size, 0), format)
    assert torch.equal(zeros.dequantize(torch.bfloat16), torch.zeros(7, 33, dtype=torch.bfloat16))
    weight = torch.randn(7, 33)
    found = FourBitWeight.quantize(weight, spec, format).dequantize(torch.float32)
    assert found.shape == weight.shape
    assert (found - weight).norm() / weight.norm() < 0.2


@EVERY
def test_values_that_are_not_finite_are_refused(format: FourBitFormat) -> None:
    with pytest.raises(UserError, match="NaN or infinite"):
        FourBitWeight.quantize(torch.tensor([1.0, float("nan")]), NF4Spec(), format)


def test_nf4_errs_least_on_normal_weights() -> None:
    weight = torch.randn(512, 512)
    errors = {
        format.name: (FourBitWeight.quantize(weight, NF4Spec(), format).dequantize(torch.float32) - weight).norm()
        for format in FORMATS.values()
    }
    assert errors["nf4"] < errors["int4"] < errors["fp4"]
