"""NF4 and FP4 weights as bitsandbytes writes them into safetensors, both ways and byte for byte.

For a weight called `P.weight`: `P.weight` uint8 (ceil(numel / 2), 1), `.absmax`, `.quant_map`, with double quantization
`.nested_absmax` and `.nested_quant_map`, and `.quant_state.bitsandbytes__nf4`, the rest as JSON in a uint8 tensor.
Models are computed in NF4 alone: FP4 is there to be held against it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from nybble.errors import UserError, listed
from nybble.ops.nf4 import absmax_levels
from nybble.quant.format import NF4Spec
from nybble.quant.four_bit import FP4, NF4, FourBitFormat, FourBitWeight
from nybble.quant.weight import NF4Weight

_STATE = ".quant_state.bitsandbytes__nf4"
_OTHER_STATE = ".quant_state.bitsandbytes__fp4"
_TABLES = (".quant_map", ".nested_quant_map", _STATE)
_PARTS = (".absmax", ".nested_absmax", *_TABLES)


def to_bnb(name: str, weight: NF4Weight | FourBitWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of `weight` under the keys bitsandbytes looks for; `dtype` is what it dequantizes to by default."""
    format = weight.format if isinstance(weight, FourBitWeight) else NF4
    assert format in (NF4, FP4)  # bitsandbytes reads no other
    state: dict[str, Any] = {
        "quant_type": format.name,
        "blocksize": weight.spec.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    device = weight.codes.device
    tensors = {
        name: weight.codes.view(-1, 1),
        f"{name}.absmax": weight.absmax,
        f"{name}.quant_map": format.table(device),
    }
    if weight.group_absmax is not None and weight.offset is not None:
        tensors[f"{name}.nested_absmax"] = weight.group_absmax
        tensors[f"{name}.nested_quant_map"] = absmax_levels(device).clone()
        state["nested_blocksize"] = weight.spec.group_size
        state["nested_dtype"] = "float32"
        state["nested_offset"] = weight.offset.item()
    tensors[name + _state_key(format)] = torch.tensor(
        list(json.dumps(state).encode()), dtype=torch.uint8, device=device
    )
    return tensors


def from_bnb(name: str, tensors: Mapping[str, Tensor]) -> NF4Weight:
    """The weight called `name` among `tensors`, without a copy; raises UserError with every problem it has.

    Its tables (`table_keys`) may be on the CPU and the others on a GPU.
    """
    if name + _STATE not in tensors:
        kind = "FP4, which is not supported" if name + _OTHER_STATE in tensors else "not in bitsandbytes' 4-bit format"
        raise UserError(f"the weight is {kind}", where=name, fix="Start from the 16-bit checkpoint, or one in NF4.")
    return NF4Weight(*_parts(name, tensors, NF4))


def fp4_from_bnb(name: str, tensors: Mapping[str, Tensor]) -> FourBitWeight:
    """The FP4 weight called `name` among `tensors`, without a copy; raises UserError with every problem it has."""
    if name + _OTHER_STATE not in tensors:
        raise UserError("the weight is not in bitsandbytes' FP4", where=name)
    return FourBitWeight(*_parts(name, tensors, FP4), FP4)


def _state_key(format: FourBitFormat) -> str:
    return _STATE if format == NF4 else _OTHER_STATE


def _parts(
    name: str, tensors: Mapping[str, Tensor], format: FourBitFormat
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, tuple[int, ...], NF4Spec]:
    """Codes, absmax, group_absmax, offset, shape and spec."""
    state = json.loads(bytes(tensors[name + _state_key(format)].tolist()))
    spec = NF4Spec(state["blocksize"], state.get("nested_blocksize", 0))
    shape = tuple(state["shape"])
    problems = _problems(name, tensors, shape, spec, format)
    if problems:
        raise UserError(listed("the quantized weight is not whole:", problems), where=name)
    # Older checkpoints hold the packed bytes under another dtype (bnb_4bit_quant_storage).
    codes = tensors[name].reshape(-1).view(torch.uint8)
    absmax = tensors[f"{name}.absmax"]
    if not spec.double_quant:
        return codes, absmax, None, None, shape, spec
    group_absmax = tensors[f"{name}.nested_absmax"]
    offset = torch.tensor([state["nested_offset"]], dtype=torch.float32, device=absmax.device)
    return codes, absmax, group_absmax, offset, shape, spec


def quantized_names(keys: Iterable[str]) -> set[str]:
    """The weights among `keys` that lie there as bitsandbytes' 4-bit tensors, FP4 too."""
    return {key.removesuffix(state) for key in keys for state in (_STATE, _OTHER_STATE) if key.endswith(state)}


def part_keys(name: str, keys: Iterable[str]) -> set[str]:
    """Those of `keys` that belong to the quantized weight `name`."""
    return {name, *(name + part for part in (*_PARTS, _OTHER_STATE))}.intersection(keys)


def table_keys(name: str) -> set[str]:
    """Names of what is said about the quantized weight `name` and read on the CPU; no device needs it."""
    return {name + table for table in _TABLES}


def bnb_quantization_config(
    spec: NF4Spec, compute: torch.dtype, *, skip_modules: Sequence[str] | None = None
) -> dict[str, Any]:
    """The `quantization_config` of a config.json by which Transformers loads such a folder.

    `skip_modules`: linear layers left in 16 bit, by name; None leaves out the output embedding only.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": spec.double_quant,
        "bnb_4bit_compute_dtype": str(compute).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": None if skip_modules is None else list(skip_modules),
    }


def _problems(
    name: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...], spec: NF4Spec, format: FourBitFormat
) -> list[str]:
    numel = prod(shape)
    needed = {
        name: (numel + 1) // 2,
        f"{name}.absmax": spec.num_blocks(numel) * (1 if spec.double_quant else 4),
        f"{name}.quant_map": 16 * 4,
    }
    if spec.double_quant:
        needed |= {f"{name}.nested_absmax": spec.num_groups(numel) * 4, f"{name}.nested_quant_map": 256 * 4}
    problems = [f"{key} is missing" for key in needed if key not in tensors]
    problems += [
        f"{key} has {tensors[key].nbytes} bytes; shape {shape} needs {num_bytes}"
        for key, num_bytes in needed.items()
        if key in tensors and tensors[key].nbytes != num_bytes
    ]
    return problems or _foreign_tables(name, tensors, spec, format)


def _foreign_tables(name: str, tensors: Mapping[str, Tensor], spec: NF4Spec, format: FourBitFormat) -> list[str]:
    expected = {f"{name}.quant_map": format.table("cpu")}
    if spec.double_quant:
        expected[f"{name}.nested_quant_map"] = absmax_levels(torch.device("cpu"))
    # An ulp: tables computed on another machine.
    return [
        f"{key} does not hold the standard levels"
        for key, table in expected.items()
        if not torch.allclose(tensors[key].cpu().float(), table, rtol=1e-6, atol=1e-7)
    ]
