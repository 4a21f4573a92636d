"""A 16-bit checkpoint becomes a 4-bit one in bitsandbytes' format, streamed in blocks of tensors."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nybble.adapters.provenance import Provenance
from nybble.errors import UserError
from nybble.files import atomic_folder, write_json
from nybble.models.checkpoint import Checkpoint
from nybble.models.conversion import ParameterMap
from nybble.models.dtypes import dtype_name
from nybble.models.load import quantize_weight
from nybble.models.progress import shown
from nybble.models.shards import MAX_SHARD_BYTES, ShardWriter, header_room
from nybble.models.skeleton import Skeleton, build_skeleton, expert_parameters
from nybble.models.tensorfile import TensorBlocks, TensorEntry
from nybble.quant.bnb import bnb_quantization_config, to_bnb
from nybble.quant.format import NF4Spec

_TENSORS_A_WEIGHT = 6  # codes, two tables, two levels of scales, the state


@dataclass(frozen=True)
class QuantizeReport:
    """What was written: bytes before and after, and how many weights are in how many bits each."""

    output: Path
    fingerprint: str  # of the checkpoint that was quantized
    source_bytes: int
    output_bytes: int
    quantized_weights: int
    bits_per_weight: float  # of the quantized weights, their scales included, their tables not
    kept: tuple[str, ...]  # linear layers that were not quantized
    expert_weights: int  # of a mixture of experts: held for all experts in one tensor, which is not quantized
    kept_dtype: str  # of all that was not quantized
    seconds: float


def quantize_checkpoint(
    checkpoint: Checkpoint,
    output: Path,
    spec: NF4Spec,
    *,
    device: torch.device,
    progress: bool = False,
    trust_remote_code: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> QuantizeReport:
    """Write `checkpoint` with the linears of its decoder in NF4 into the new folder `output`.

    The head, the embeddings, routers and experts keep their dtype. Transformers with bitsandbytes loads the folder,
    and nybble.json beside the weights names the original. Raises UserError when `output` exists or cannot be written,
    or the checkpoint is in 4 bit already.
    """
    started = time.perf_counter()
    if checkpoint.nf4_weights:
        raise UserError("is in 4 bit already", where=checkpoint.folder)
    skeleton = build_skeleton(checkpoint, trust_remote_code=trust_remote_code)
    names = ParameterMap.build(skeleton.model, checkpoint.weights)
    names.require_complete(checkpoint.folder)
    plan = _Plan(checkpoint, skeleton, names, spec, device)
    with atomic_folder(output) as aside:
        room = header_room(plan.keys * _TENSORS_A_WEIGHT)
        with ShardWriter(aside, room, max_shard_bytes) as writer:
            for (key,) in shown([(key,) for key in plan.keys], checkpoint, "Quantizing", progress=progress):
                plan.write(key, writer)
        _copy_settings(checkpoint, aside)
        _write_config(checkpoint, aside, spec, skeleton.skipped)
        _provenance(checkpoint, spec).write(aside)
    return QuantizeReport(
        output=output,
        fingerprint=checkpoint.fingerprint,
        source_bytes=checkpoint.total_bytes,
        output_bytes=writer.total_bytes,
        quantized_weights=plan.quantized_weights,
        bits_per_weight=8 * plan.packed_bytes / max(1, plan.quantized_weights),
        kept=skeleton.skipped,
        expert_weights=sum(parameter.numel() for parameter in expert_parameters(skeleton.model).values()),
        kept_dtype=dtype_name(checkpoint.dtype),
        seconds=time.perf_counter() - started,
    )


class _Plan:
    """Which keys are quantized, and what has been so far."""

    def __init__(
        self, checkpoint: Checkpoint, skeleton: Skeleton, names: ParameterMap, spec: NF4Spec, device: torch.device
    ) -> None:
        self._checkpoint = checkpoint
        self._spec = spec
        self._device = device
        linears = {f"{path}.weight": path for path in skeleton.quantizable}
        self._transposed = {
            key: skeleton.is_transposed(linears[parameter])
            for key, parameter in names.parameter_of.items()
            if parameter in linears
        }
        keys = [key for assignment in names.assignments for key in assignment.keys]
        self.keys = sorted(keys, key=checkpoint.position)
        self.quantized_weights = 0
        self.packed_bytes = 0

    def write(self, key: str, writer: ShardWriter) -> None:
        """Append what one tensor of the checkpoint becomes."""
        entry = self._checkpoint.entries[key]
        if key not in self._transposed:
            writer.add_blocks(key, entry.dtype, entry.shape, (part.read() for part in entry.blocks()))
            return
        weight = quantize_weight(key, self._read(entry, transposed=self._transposed[key]), self._spec)
        self.quantized_weights += weight.numel
        self.packed_bytes += weight.nbytes
        for name, tensor in to_bnb(key, weight, entry.dtype).items():
            writer.add(name, tensor)

    def _read(self, entry: TensorEntry, *, transposed: bool) -> Tensor | TensorBlocks:
        if transposed:
            return entry.read().to(self._device).t().contiguous()
        return TensorBlocks(entry.shape, self._device, (part.read().to(self._device) for part in entry.blocks()))


def _write_config(checkpoint: Checkpoint, folder: Path, spec: NF4Spec, skipped: tuple[str, ...]) -> None:
    quantization = bnb_quantization_config(spec, checkpoint.dtype, skip_modules=skipped)
    write_json(folder / "config.json", {**checkpoint.config, "quantization_config": quantization})


def _provenance(checkpoint: Checkpoint, spec: NF4Spec) -> Provenance:
    return Provenance(
        base=checkpoint.name,
        base_fingerprint=checkpoint.fingerprint,
        storage="nf4",
        block_size=spec.block_size,
        double_quant=spec.double_quant,
    )


def _copy_settings(checkpoint: Checkpoint, folder: Path) -> None:
    """Tokenizer, chat template, generation settings, code: all that is neither weights nor their index."""
    for path in checkpoint.settings_files:
        shutil.copyfile(path, folder / path.name)
