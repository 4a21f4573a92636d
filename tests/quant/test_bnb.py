"""NF4 weights in bitsandbytes' format, both ways, against its own API."""

from __future__ import annotations

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import pytest
import safetensors.torch
import torch
from torch import Tensor

from nybble.errors import UserError
from nybble.quant.bnb import bnb_quantization_config, from_bnb, part_keys, quantized_names, to_bnb
from nybble.quant.format import NF4Spec
from nybble.quant.weight import NF4Weight

NAME = "model.layers.0.mlp.up_proj.weight"
SPECS = [NF4Spec(), NF4Spec(group_size=0), NF4Spec(block_size=128)]


def their_tensors(weight: Tensor, spec: NF4Spec) -> dict[str, Tensor]:
    packed, state = bnb_functional.quantize_4bit(
        weight, blocksize=spec.block_size, compress_statistics=spec.double_quant, quant_type="nf4"
    )
    return {NAME: packed} | {f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", [(48, 96), (40, 33)])
def test_theirs_read_and_written_again_are_the_same_bytes(spec: NF4Spec, shape: tuple[int, int]) -> None:
    theirs = their_tensors(torch.randn(shape, dtype=torch.bfloat16), spec)
    ours = to_bnb(NAME, from_bnb(NAME, theirs), torch.bfloat16)
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert torch.equal(ours[key], tensor), key


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_theirs_dequantize_the_same_here(spec: NF4Spec) -> None:
    weight = torch.randn(48, 128, dtype=torch.bfloat16)
    theirs = their_tensors(weight, spec)
    packed, state = bnb_functional.quantize_4bit(
        weight, blocksize=spec.block_size, compress_statistics=spec.double_quant, quant_type="nf4"
    )
    found = from_bnb(NAME, theirs).dequantize(torch.bfloat16)
    assert torch.equal(found, bnb_functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_bitsandbytes_loads_ours(spec: NF4Spec) -> None:
    weight = NF4Weight.quantize(torch.randn(48, 128), spec)
    tensors = safetensors.torch.load(safetensors.torch.save(to_bnb(NAME, weight, torch.bfloat16)))
    state = {key.removeprefix(NAME + "."): value for key, value in tensors.items() if key != NAME}
    parameter = bnb.nn.Params4bit.from_prequantized(tensors[NAME], state, device="cpu")
    found = bnb_functional.dequantize_4bit(parameter.data, parameter.quant_state)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, weight.dequantize(torch.bfloat16))


def test_names_and_parts() -> None:
    tensors = their_tensors(torch.randn(48, 96), NF4Spec()) | {"model.norm.weight": torch.ones(96)}
    assert quantized_names(tensors) == {NAME}
    assert part_keys(NAME, tensors) == set(tensors) - {"model.norm.weight"}


def test_packed_bytes_under_another_dtype() -> None:
    tensors = their_tensors(torch.randn(48, 96), NF4Spec())
    expected = from_bnb(NAME, tensors).codes
    tensors[NAME] = tensors[NAME].view(-1).view(torch.bfloat16).view(-1, 1)
    assert torch.equal(from_bnb(NAME, tensors).codes, expected)


def test_every_problem_is_named() -> None:
    tensors = their_tensors(torch.randn(48, 96), NF4Spec())
    tensors[NAME] = tensors[NAME][:-8]
    del tensors[f"{NAME}.nested_absmax"]
    with pytest.raises(UserError) as caught:
        from_bnb(NAME, tensors)
    assert f"{NAME} has 2296 bytes; shape (48, 96) needs 2304" in str(caught.value)
    assert f"{NAME}.nested_absmax is missing" in str(caught.value)


def test_other_levels_and_other_formats_are_refused() -> None:
    tensors = their_tensors(torch.randn(48, 96), NF4Spec())
    tensors[f"{NAME}.quant_map"] = torch.linspace(-1, 1, 16)
    with pytest.raises(UserError, match="quant_map does not hold the standard levels"):
        from_bnb(NAME, tensors)
    with pytest.raises(UserError, match="FP4, which is not supported"):
        from_bnb(NAME, {NAME: tensors[NAME], f"{NAME}.quant_state.bitsandbytes__fp4": tensors[NAME]})
    with pytest.raises(UserError, match="not in bitsandbytes' 4-bit format"):
        from_bnb(NAME, {NAME: tensors[NAME]})


def test_quantization_config_is_what_transformers_reads() -> None:
    from transformers import BitsAndBytesConfig

    values = bnb_quantization_config(NF4Spec(), torch.bfloat16, skip_modules=["lm_head"])
    config = BitsAndBytesConfig.from_dict(values)
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert config.bnb_4bit_quant_storage == torch.uint8
    assert config.llm_int8_skip_modules == ["lm_head"]
    assert not bnb_quantization_config(NF4Spec(group_size=0), torch.bfloat16)["bnb_4bit_use_double_quant"]
