"""A 16-bit checkpoint becomes a 4-bit one in bitsandbytes' format, streamed in blocks of tensors."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from nybble.adapters.provenance import Provenance, Rounding
from nybble.calibrate.finished import FinishedLayers
from nybble.calibrate.run import Calibration, calibrate
from nybble.errors import UserError, listed
from nybble.export.base_weight import StoredBase
from nybble.files import atomic_folder, require_new_folder, write_json
from nybble.models.checkpoint import Checkpoint
from nybble.models.conversion import ParameterMap
from nybble.models.dtypes import dtype_name
from nybble.models.load import quantize_weight
from nybble.models.progress import shown
from nybble.models.shards import MAX_SHARD_BYTES, ShardWriter, header_room
from nybble.models.skeleton import Skeleton, build_skeleton, expert_parameters
from nybble.models.tensorfile import TensorEntry
from nybble.quant.bnb import bnb_quantization_config, to_bnb
from nybble.quant.correction import write_corrections
from nybble.quant.format import NF4Spec
from nybble.quant.weight import NF4Weight
from nybble.units import format_bytes, format_count

NEED_TEXT: tuple[Rounding, ...] = ("weighted", "compensated")
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
    rounding: str
    calibration_tokens: int
    unreached: tuple[str, ...]  # linears that no token of the calibration came to, so that they were rounded without it
    untuned_bytes: int  # of the device's memory, which was too small to tune scales
    seconds: float

    @property
    def notes(self) -> list[str]:
        """What was not done to some of the weights, a line for each."""
        notes = []
        if self.expert_weights:
            notes.append(
                f"{format_count(self.expert_weights)} weights of experts stay in {self.kept_dtype}: "
                "only linear layers are quantized, and one tensor holds all experts of a block"
            )
        if self.unreached:
            rounding = "nearest" if self.rounding == "nearest" else "search"
            what = f"rounded by {rounding}, without correction, as no token of the calibration reached them:"
            notes.append(listed(what, self.unreached, most=5))
        if self.untuned_bytes:
            needed = format_bytes(self.untuned_bytes)
            notes.append(f"scales were not tuned together, which takes about {needed} of the device's memory")
        return notes


def quantize_checkpoint(
    checkpoint: Checkpoint,
    output: Path,
    spec: NF4Spec,
    *,
    device: torch.device,
    rounding: Rounding = "nearest",
    calibration: Calibration | None = None,
    progress: bool = False,
    trust_remote_code: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> QuantizeReport:
    """Write `checkpoint` with the linears of its decoder in NF4 into the new folder `output`.

    The head, the embeddings, routers and experts keep their dtype. Transformers with bitsandbytes loads the folder,
    and nybble.json beside the weights names the original and says how codes were chosen. With `calibration` its text is
    passed through the model first, and correction.safetensors has what quantizing left; a pass that was interrupted
    goes on when the same is asked for again. Raises UserError when `output` exists or cannot be written, the checkpoint
    is in 4 bit already, or the rounding needs a calibration and there is none.
    """
    started = time.perf_counter()
    require_not_quantized(checkpoint)
    require_text_for(rounding, calibration)
    require_new_folder(output)
    finished: FinishedLayers | None = None
    if calibration is not None:
        aside, trusted = output.with_name(f".{output.name}.calibration"), trust_remote_code
        finished = calibrate(
            checkpoint, spec, rounding, calibration, aside,
            device=device, trust_remote_code=trusted, progress=progress,
        )  # fmt: skip
    skeleton = build_skeleton(checkpoint, trust_remote_code=trust_remote_code)
    names = ParameterMap.build(skeleton.model, checkpoint.weights)
    names.require_complete(checkpoint.folder)
    on_the_way: Literal["nearest", "search"] = "nearest" if rounding == "nearest" else "search"
    plan = _Plan(checkpoint, skeleton, names, spec, device, on_the_way, finished)
    with atomic_folder(output) as aside:
        room = header_room(plan.keys * _TENSORS_A_WEIGHT)
        with ShardWriter(aside, room, max_shard_bytes) as writer:
            for (key,) in shown([(key,) for key in plan.keys], checkpoint, "Quantizing", progress=progress):
                plan.write(key, writer)
        _copy_settings(checkpoint, aside)
        _write_config(checkpoint, aside, spec, skeleton.skipped)
        _provenance(checkpoint, spec, rounding, calibration).write(aside)
        if finished is not None and calibration is not None and calibration.rank:
            write_corrections(aside, finished.corrections())
    unreached = finished.unreached() if finished else ()
    if finished is not None:
        finished.remove()
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
        rounding=rounding,
        calibration_tokens=calibration.text.tokens if calibration else 0,
        unreached=unreached,
        untuned_bytes=finished.untuned_bytes if finished else 0,
        seconds=time.perf_counter() - started,
    )


def require_not_quantized(checkpoint: Checkpoint) -> None:
    if checkpoint.nf4_weights:
        raise UserError("is in 4 bit already", where=checkpoint.folder)


def require_text_for(rounding: Rounding, calibration: Calibration | None) -> None:
    """Raise UserError if `rounding` weighs errors by a text and there is none."""
    if rounding in NEED_TEXT and calibration is None:
        what = f"{rounding} rounding needs a text to weigh errors by"
        fix = "Give a text file or data like what the model is for; rows to train on will do, rows to test on will not."
        raise UserError(what, where="--calibration", fix=fix)


class _Plan:
    """Which keys are quantized, and what has been so far."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        skeleton: Skeleton,
        names: ParameterMap,
        spec: NF4Spec,
        device: torch.device,
        rounding: Literal["nearest", "search"],
        finished: FinishedLayers | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._spec = spec
        self._device = device
        self._rounding = rounding
        self._finished = finished
        self._parameter_of = names.parameter_of
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
        weight = self._prepared(key) or self._quantized(key, entry)
        self.quantized_weights += weight.numel
        self.packed_bytes += weight.nbytes
        for name, tensor in to_bnb(key, weight, entry.dtype).items():
            writer.add(name, tensor)

    def _prepared(self, key: str) -> NF4Weight | None:
        """The weight as the calibration pass made it; None if there was none, or it is of no decoder layer."""
        if self._finished is None:
            return None
        return self._finished.weight(self._parameter_of[key].removesuffix(".weight"))

    def _quantized(self, key: str, entry: TensorEntry) -> NF4Weight:
        stored = StoredBase(entry, self._device, self._transposed[key])
        return quantize_weight(key, stored.streamed(), self._spec, self._rounding)


def _write_config(checkpoint: Checkpoint, folder: Path, spec: NF4Spec, skipped: tuple[str, ...]) -> None:
    quantization = bnb_quantization_config(spec, checkpoint.dtype, skip_modules=skipped)
    write_json(folder / "config.json", {**checkpoint.config, "quantization_config": quantization})


def _provenance(
    checkpoint: Checkpoint, spec: NF4Spec, rounding: Rounding, calibration: Calibration | None
) -> Provenance:
    return Provenance(
        base=checkpoint.name,
        revision=checkpoint.revision,
        base_fingerprint=checkpoint.fingerprint,
        storage="nf4",
        block_size=spec.block_size,
        double_quant=spec.double_quant,
        rounding=rounding,
        calibration=calibration.text.digest if calibration and rounding in NEED_TEXT else None,
    )


def _copy_settings(checkpoint: Checkpoint, folder: Path) -> None:
    """Tokenizer, chat template, generation settings, code: all that is neither weights nor their index."""
    for path in checkpoint.settings_files:
        shutil.copyfile(path, folder / path.name)
