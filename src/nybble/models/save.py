"""A trained model back into a folder that Transformers loads: names and shapes as the checkpoint had them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nybble.errors import UserError, listed
from nybble.files import atomic_folder
from nybble.models.checkpoint import Checkpoint
from nybble.models.conversion import checkpoint_names, kept_in_fp32
from nybble.models.shards import MAX_SHARD_BYTES, ShardWriter, header_room
from nybble.quant.linear import DenseLinear, NF4Linear
from nybble.sharded import full_tensor


def save_full_model(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    *,
    replace: bool = False,
    write: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `model` into the folder `folder`, weights rounded once to `dtype`, and compare what can be read back.

    A tied weight is stored once and GPT-2's linears as (in, out); one tensor is in memory at a time. The folder is
    whole or not there. Every process of a sharded model calls, so that its tensors can be gathered; those without
    `write` write nothing. Raises UserError when the folder exists and is not to be replaced, cannot be written, or
    does not read back as it was held, and when the model holds 4-bit weights.
    """
    tensors = checkpoint_names(model, _stored(model))
    if not write:
        for _ in range(2):  # once for writing, once for comparing
            for _ in _rounded(model, tensors, dtype):
                pass
        return
    with atomic_folder(folder, replace=replace) as aside:
        with ShardWriter(aside, header_room(list(tensors)), max_shard_bytes) as writer:
            for name, tensor in _rounded(model, tensors, dtype):
                writer.add(name, tensor)
        _write_settings(model, aside, dtype)
        tokenizer.save_pretrained(aside)
        _compare(folder, _rounded(model, tensors, dtype), Checkpoint.open(str(aside)))


def _stored(model: PreTrainedModel) -> dict[str, Tensor]:
    """Views of the tensors to write by the model's names, each one once."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, NF4Linear):
            fix = "Save the adapter, and merge it into the checkpoint with `nybble merge`."
            raise UserError(f"{path} is held in 4 bit and cannot be saved in full", fix=fix)
        for leaf, tensor in module.state_dict(keep_vars=True).items():
            if "." in leaf or id(tensor) in seen:
                continue  # another module's own, or tied
            seen.add(id(tensor))
            tensors[f"{path}.{leaf}".removeprefix(".")] = _as_in_file(module, leaf, tensor.detach())
    return tensors


def _as_in_file(module: nn.Module, leaf: str, tensor: Tensor) -> Tensor:
    transposed = isinstance(module, DenseLinear) and module.fan_in_fan_out and leaf == "weight"
    return tensor.t() if transposed else tensor


def _rounded(model: PreTrainedModel, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The tensors as they go into the file, gathered one by one where they are sharded."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not kept_in_fp32(model, name, dtype):
            tensor = tensor.to(dtype)
        yield name, full_tensor(tensor)


def _compare(folder: Path, held: Iterable[tuple[str, Tensor]], written: Checkpoint) -> None:
    differing = [name for name, tensor in held if not _same_bits(tensor, written.read(name))]
    if differing:
        what = listed("what was written is not what was held:", differing, most=8)
        raise UserError(what, where=folder, fix="Check the disk.")


def _same_bits(held: Tensor, written: Tensor) -> bool:
    if held.dtype != written.dtype or held.shape != written.shape:
        return False
    one, other = (tensor.cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (held, written))
    return torch.equal(one, other)


def _write_settings(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
