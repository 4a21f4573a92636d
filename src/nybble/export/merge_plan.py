"""Which tensor of a checkpoint becomes what in the merged one; every problem is found before the first is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nybble.adapters.difference import difference
from nybble.adapters.merge import MergeStats, merged_weight, replaced_weight
from nybble.adapters.provenance import check_codes
from nybble.adapters.saved import SavedAdapter, is_copy
from nybble.errors import UserError, listed
from nybble.export.base_weight import QuantizedBase, StoredBase
from nybble.models.checkpoint import Checkpoint
from nybble.models.conversion import ParameterMap, kept_in_fp32
from nybble.models.load import quantize_weight
from nybble.models.skeleton import build_skeleton
from nybble.quant.format import NF4Spec

Base = Literal["original", "dequantized"]


@dataclass(frozen=True)
class MergedBlock:
    """Some rows of a merged tensor, and what the adapter did to them."""

    tensor: Tensor
    stats: MergeStats


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the merged checkpoint, which is read and merged as its blocks are taken."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Iterator[MergedBlock]


class MergePlan:
    """One way to merge an adapter into a checkpoint. Making it raises UserError when the two do not fit."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        adapter: SavedAdapter,
        base: Base,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
        adapter = _adapter_for(adapter, base)
        self.checkpoint, self.adapter, self.base = checkpoint, adapter, base
        self._dtype, self._device = dtype, device
        self._spec = _nf4_spec(checkpoint, adapter, base)
        searched = adapter.provenance is not None and adapter.provenance.rounding == "search"
        self._rounding: Literal["nearest", "search"] = "search" if searched else "nearest"
        self._skeleton = build_skeleton(checkpoint, trust_remote_code=trust_remote_code)
        self._map = ParameterMap.build(self._skeleton.model, checkpoint.weights)
        self._map.require_complete(checkpoint.folder)
        self._linear_of = {f"{path}.weight": path for path in (*self._skeleton.quantizable, *self._skeleton.skipped)}
        self._pairs = {f"{path}.weight": pair for path, pair in adapter.pairs.items()}
        self._require_fit()
        self._also, self.untied = self._untie()
        self.keys = sorted(checkpoint.weights, key=checkpoint.position)
        self.names = [*self.keys, *(name for names in self._also.values() for name in names)]

    def tensors(self, key: str) -> Iterator[MergedTensor]:
        """All that is written for the checkpoint's weight `key`."""
        yield self._merge(key, key, self._map.parameter_of.get(key, key))
        for parameter in self._also.get(key, ()):
            yield self._merge(parameter, key, parameter)

    def config(self) -> dict[str, Any]:
        """config.json of the merged model."""
        config = deepcopy(dict(self.checkpoint.config))
        config.pop("quantization_config", None)
        for section in (config, config.get("text_config") or {}):
            if self.untied:
                section["tie_word_embeddings"] = False
            if self._dtype is not None:
                section.pop("torch_dtype", None)
                section["dtype"] = str(self._dtype).removeprefix("torch.")
        return config

    def _merge(self, name: str, key: str, parameter: str) -> MergedTensor:
        base, dtype = self._base_weight(key, parameter), self._dtype_of(key, parameter)
        blocks = (self._merge_rows(name, base, rows, parameter, dtype) for rows in base.row_blocks())
        return MergedTensor(name, dtype, base.shape[::-1] if base.transposed else base.shape, blocks)

    def _merge_rows(
        self, name: str, base: StoredBase | QuantizedBase, rows: slice, parameter: str, dtype: torch.dtype
    ) -> MergedBlock:
        weight, stats = base.read(rows), MergeStats()
        if (copy := self.adapter.base_copies.get(parameter)) is not None and not is_copy(weight, copy[rows]):
            what = f"brings a {parameter} for its base that is not the checkpoint's"
            raise UserError(what, where=self.adapter.folder, fix="Was it trained on another base?")
        if (pair := self._pairs.get(parameter)) is not None:
            weight, stats = merged_weight(weight, pair.rows(rows), dtype)
        elif (trained := self.adapter.whole.get(parameter)) is not None:
            weight, stats = replaced_weight(weight, (trained.t() if base.transposed else trained)[rows], dtype)
        else:
            weight = weight.to(dtype)
        if stats.touched and not bool(torch.isfinite(weight).all()):
            fix = "Merge into a dtype with a wider range: --dtype bf16 or fp32."
            raise UserError(f"{name} has merged values beyond the range of {dtype}", where=self.adapter.folder, fix=fix)
        return MergedBlock(weight.t() if base.transposed else weight, stats)

    def _base_weight(self, key: str, parameter: str) -> StoredBase | QuantizedBase:
        transposed = self._is_transposed(parameter)
        if key in self.checkpoint.nf4_weights:
            return QuantizedBase(self.checkpoint.read_nf4(key, self._device), transposed)
        stored = StoredBase(self.checkpoint.entries[key], self._device, transposed)
        if self._spec is None or self._linear_of.get(parameter) not in self._skeleton.quantizable:
            return stored
        return QuantizedBase(quantize_weight(key, stored.streamed(), self._spec, self._rounding), transposed)

    def _dtype_of(self, key: str, parameter: str) -> torch.dtype:
        own = self.checkpoint.dtype if key in self.checkpoint.nf4_weights else self.checkpoint.entries[key].dtype
        if self._dtype is None or not own.is_floating_point:
            return own
        return torch.float32 if kept_in_fp32(self._skeleton.model, parameter, self._dtype) else self._dtype

    def _is_transposed(self, parameter: str) -> bool:
        return parameter in self._linear_of and self._skeleton.is_transposed(self._linear_of[parameter])

    def _require_fit(self) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in self._skeleton.model.state_dict().items()}
        ours: dict[str, tuple[int, ...]] = {}
        for name, pair in self._pairs.items():
            shape = (pair.B.shape[0], pair.A.shape[1])
            ours[name] = shape[::-1] if self._is_transposed(name) else shape
        ours |= {name: tuple(tensor.shape) for name, tensor in self.adapter.whole.items()}
        problems = [
            f"{name}: {shape} in the adapter, {shapes.get(name, 'nothing')} in the model"
            for name, shape in ours.items()
            if shapes.get(name) != shape
        ]
        problems += [
            f"{name}: the file has it in pieces that the model joins; nothing can be merged into it"
            for name in ours
            if name in shapes and name not in self._map.key_of
        ]
        if problems:
            what = listed(f"{len(problems)} tensors do not fit {self.checkpoint.name}:", problems, most=8)
            raise UserError(what, where=self.adapter.folder, fix="Was it trained on another base?")

    def _untie(self) -> tuple[dict[str, list[str]], bool]:
        """Parameters to be written beside the one they were tied to, by its key, and whether any ties are undone."""
        changed = {*self._pairs, *self.adapter.whole}
        also: dict[str, list[str]] = defaultdict(list)
        for target, source in self._map.ties.items():
            if changed & {target, source}:
                also[self._map.key_of[source]].append(target)
        apart = any(changed & {target, source} for target, source in self._map.duplicates.items())
        return dict(also), bool(also) or apart


def _adapter_for(adapter: SavedAdapter, base: Base) -> SavedAdapter:
    """What is to be added to the weights of `base`: on the original ones an adapter's start would count twice."""
    trained_on = adapter.provenance
    if trained_on is None or not trained_on.counts_its_start:
        return adapter
    if base == "original":
        return difference(adapter)
    if trained_on.residual_fingerprint is not None:
        what = f"its start ({trained_on.init}) was taken out of the base, so it does not belong on what NF4 makes of it"
        raise UserError(what, where=adapter.folder, fix="Merge it with --base original, into the 16-bit checkpoint.")
    return adapter


def _nf4_spec(checkpoint: Checkpoint, adapter: SavedAdapter, base: Base) -> NF4Spec | None:
    """How NF4 is to round the checkpoint first; None if not at all, or if it is in NF4 already."""
    trained_on = adapter.provenance
    if checkpoint.nf4_weights and base == "original":
        fix = "Give the 16-bit checkpoint as the model, or merge with --base dequantized."
        raise UserError("is in 4 bit: it does not have the original weights", where=checkpoint.folder, fix=fix)
    if base == "dequantized" and trained_on is not None:
        check_codes(trained_on, checkpoint.folder, held=checkpoint.codes_fingerprint)
    if checkpoint.nf4_weights or base == "original":
        return None
    if trained_on is None:
        return NF4Spec()  # an adapter of PEFT's does not say; these are bitsandbytes' settings for QLoRA
    if not trained_on.belongs_to_nf4:
        held = "as it is" if trained_on.difference else f"in {trained_on.storage}"
        what = f"belongs to the base {held}, so no dequantized weights belong to it"
        raise UserError(what, where=adapter.folder, fix="Merge it with --base original.")
    return NF4Spec.of(trained_on.block_size or NF4Spec.block_size, double_quant=bool(trained_on.double_quant))
