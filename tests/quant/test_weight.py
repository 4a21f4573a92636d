"""NF4Weight: the bytes it holds."""

from __future__ import annotations

import pytest
import torch

from nybble.errors import UserError
from nybble.quant.format import NF4Spec
from nybble.quant.weight import NF4Weight

PLAIN = NF4Spec(group_size=0)


def test_bits_per_weight_are_counted_from_the_bytes_held() -> None:
    weight = torch.randn(1024, 1024)
    assert NF4Weight.quantize(weight, PLAIN).bits_per_weight == 4.5
    # 4 + 8 / 64 + 32 / (64 * 256), and 32 bits of offset.
    double = NF4Weight.quantize(weight, NF4Spec())
    assert double.bits_per_weight == 4 + 8 / 64 + 32 / (64 * 256) + 32 / weight.numel()
    assert round(double.bits_per_weight, 3) == 4.127


def test_nbytes_of_a_weight_whose_last_block_is_short() -> None:
    weight = NF4Weight.quantize(torch.randn(33, 67), NF4Spec(32, 4))
    blocks, groups = 70, 18  # of 2,211 values
    assert weight.nbytes == 1106 + blocks + 4 * groups + 4


@pytest.mark.parametrize("spec", [NF4Spec(), PLAIN, NF4Spec(128, 16)], ids=str)
@pytest.mark.parametrize("shape", [(48, 64), (5, 33), (2, 3, 40)])
def test_empty_has_the_layout_of_quantize(spec: NF4Spec, shape: tuple[int, ...]) -> None:
    made, room = NF4Weight.quantize(torch.randn(shape), spec), NF4Weight.empty(shape, spec)
    assert [(t.shape, t.dtype) for t in made.tensors] == [(t.shape, t.dtype) for t in room.tensors]


def test_dequantize_is_near_and_in_the_shape() -> None:
    weight = torch.randn(2, 40, 50)
    found = NF4Weight.quantize(weight, NF4Spec()).dequantize(torch.bfloat16)
    assert found.shape == weight.shape
    assert found.dtype == torch.bfloat16
    assert 0.08 < (found - weight).norm() / weight.norm() < 0.1


@pytest.mark.parametrize("spec", [NF4Spec(), PLAIN, NF4Spec(128, 4)], ids=str)
@pytest.mark.parametrize("shape", [(48, 64), (37, 33), (1, 129)])
@pytest.mark.parametrize("values", [128, 384, 10_000])
def test_blocks_make_the_bytes_of_the_whole(spec: NF4Spec, shape: tuple[int, ...], values: int) -> None:
    weight = torch.randn(shape).bfloat16()
    expected = NF4Weight.quantize(weight, spec)
    found = NF4Weight.quantize_blocks(weight.flatten().split(values), shape, spec, device="cpu")
    assert (found.shape, found.spec) == (expected.shape, expected.spec)
    assert all(torch.equal(one, other) for one, other in zip(found.tensors, expected.tensors, strict=True))


@pytest.mark.parametrize("spec", [NF4Spec(), PLAIN, NF4Spec(128, 3)], ids=str)
@pytest.mark.parametrize("shape", [(48, 64), (37, 96), (9, 2, 33)])
def test_rows_are_those_of_the_whole(spec: NF4Spec, shape: tuple[int, ...]) -> None:
    weight = NF4Weight.quantize(torch.randn(shape), spec)
    whole, single = weight.dequantize(torch.float32), weight.single_level()
    assert torch.equal(single.dequantize(torch.float32), whole)
    values = whole[0].numel()
    step = next(rows for rows in range(1, shape[0] + 1) if rows * values % spec.block_size == 0 or rows == shape[0])
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        assert torch.equal(single.rows(start, stop).dequantize(torch.float32), whole[start:stop])


def test_not_a_number_is_refused() -> None:
    weight = torch.randn(4, 64)
    weight[2, 3] = float("inf")
    with pytest.raises(UserError, match="NaN or infinite"):
        NF4Weight.quantize(weight, NF4Spec())
    with pytest.raises(UserError, match="NaN or infinite"):
        NF4Weight.quantize_blocks(weight, (4, 64), NF4Spec(), device="cpu")


def test_block_sizes_bitsandbytes_cannot_read_are_refused() -> None:
    with pytest.raises(UserError, match=r"block size 48.*\n.*32, 64"):
        NF4Spec(block_size=48)
    with pytest.raises(UserError, match="group size -1"):
        NF4Spec(group_size=-1)


def test_quantizing_needs_no_second_copy_in_fp32() -> None:
    """A weight of 40 M values in bf16 (80 MB): the fp32 copy alone would be 160 MB."""
    from torch.profiler import ProfilerActivity, profile

    weight = torch.randn(10_000, 4_000, dtype=torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        NF4Weight.quantize(weight, NF4Spec())
    events = [event.cpu_memory_usage for event in trace.events()]
    assert max(events) < 2 * weight.nbytes
