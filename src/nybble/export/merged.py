"""A checkpoint with an adapter merged into it, streamed in blocks of rows, and a record of it all: merge.json."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nybble.adapters.merge import MergeStats
from nybble.adapters.provenance import FILE as PROVENANCE_FILE
from nybble.adapters.provenance import base_fingerprint
from nybble.adapters.saved import SavedAdapter, check_base
from nybble.errors import UserError
from nybble.export.measure import ModelOutputs
from nybble.export.merge_plan import Base, MergedTensor, MergePlan
from nybble.files import atomic_folder, write_json
from nybble.models.checkpoint import Checkpoint
from nybble.models.dtypes import dtype_name
from nybble.models.progress import shown
from nybble.models.shards import MAX_SHARD_BYTES, ShardWriter, header_room
from nybble.versions import installed_versions

RECORD = "merge.json"

_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)


@dataclass(frozen=True)
class Measured:
    """How the merged model compares with the adapter on the base that it was trained on; losses in nats a token."""

    merged_loss: float
    adapter_loss: float
    largest_logit_gap: float
    target_tokens: int


@dataclass(frozen=True)
class MergeReport:
    """What was merged. `measured` has an entry for each base that was tried, if held-out data was given."""

    output: Path
    base: Base
    reason: str
    dtype: str
    fingerprint: str
    tensors_changed: int
    stats: MergeStats
    untied: bool
    output_bytes: int
    seconds: float
    measured: dict[str, Measured]


@dataclass(frozen=True)
class Measure:
    """Held-out measurement: `outputs` loads a merged folder and runs it, `reference` is the adapter on its own base."""

    outputs: Callable[[Path], ModelOutputs]
    reference: ModelOutputs

    def compare(self, folder: Path) -> Measured:
        found = self.outputs(folder)
        return Measured(found.loss, self.reference.loss, found.logit_gap(self.reference), found.target_tokens)


def merge_checkpoint(
    checkpoint: Checkpoint,
    adapter: SavedAdapter,
    output: Path,
    *,
    base: Base | None = None,
    reason: str = "asked for",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    measure: Measure | None = None,
    progress: bool = False,
    trust_remote_code: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_file: Callable[[Path], None] | None = None,
) -> MergeReport:
    """Write `checkpoint` with `adapter` in its weights into the new folder `output`; some rows are in memory at a time.

    base: "original" adds the adapter to the weights of the checkpoint; "dequantized" to what NF4 makes of them, as the
    adapter saw them in training. None: both are measured and the better kept if `measure` is given, else see
    `default_base`. reason: why `base` is given. dtype: of the result; None keeps that of every tensor. Weights are
    added in fp32 and rounded once.
    on_file: called with each file of weights once it is whole; may take it away, where the disk is too small for all.
    Raises UserError, before anything is written, when the adapter does not fit the checkpoint, was trained on another,
    or `output` exists; and when rounding left nothing of the adapter.
    """
    started = time.perf_counter()
    check_base(adapter, base_fingerprint(checkpoint.folder, checkpoint.fingerprint))
    candidates: tuple[Base, ...] = () if base is None else (base,)
    if not candidates:
        candidates, reason = _candidates(checkpoint, adapter, measure)
    plans = [
        MergePlan(checkpoint, adapter, candidate, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        for candidate in candidates
    ]
    written: dict[str, _Written] = {}
    measured: dict[str, Measured] = {}
    with atomic_folder(output) as aside:
        for plan in plans:
            folder = aside / plan.base
            folder.mkdir()
            with ShardWriter(folder, header_room(plan.names), max_shard_bytes, on_file=on_file) as writer:
                written[plan.base] = _write(plan, writer, progress=progress)
            _write_settings(plan, folder)
            if measure is not None:
                measured[plan.base] = measure.compare(folder)
        chosen = plans[0]
        if len(plans) > 1:
            chosen = min(plans, key=lambda plan: finite_or_last(measured[plan.base].merged_loss))
            reason = _measured_reason(measured)
        _keep(aside, chosen.base)
        result = written[chosen.base]
        report = MergeReport(
            output=output,
            base=chosen.base,
            reason=reason,
            dtype=dtype_name(dtype or checkpoint.dtype),
            fingerprint=checkpoint.fingerprint,
            tensors_changed=result.tensors_changed,
            stats=result.stats,
            untied=chosen.untied,
            output_bytes=result.output_bytes,
            seconds=time.perf_counter() - started,
            measured=measured,
        )
        write_json(aside / RECORD, _record(report, checkpoint, adapter))
    return report


def default_base(checkpoint: Checkpoint, adapter: SavedAdapter) -> tuple[Base, str]:
    """The base to merge into when nothing was measured, and why.

    Training over NF4 teaches the adapter to make up for NF4's error. On the original weights that error is not there,
    so the correction is one too many; on the other hand they are closer to the full model. Which counts for more is
    known by measuring only; without it the weights that the adapter was trained on are the safe choice, since there
    the merged model computes what was evaluated.
    """
    if checkpoint.nf4_weights:
        return "dequantized", "the checkpoint is in 4 bit, so its dequantized weights are all there is"
    if adapter.provenance is None:
        return "original", "the adapter does not say how its base was held; taken as trained on these weights"
    if adapter.provenance.difference or adapter.provenance.residual_fingerprint is not None:
        return "original", "what training changed belongs on the weights of the checkpoint"
    if adapter.provenance.storage != "nf4":
        return "original", f"the adapter was trained on the base in {adapter.provenance.storage}"
    if adapter.provenance.calibration is not None:
        return "original", "the NF4 codes that the adapter was trained on cannot be made from these weights again"
    return "dequantized", (
        "the adapter was trained on NF4 weights and makes up for their error; "
        "with held-out data both bases are measured and the better one is taken"
    )


def _candidates(checkpoint: Checkpoint, adapter: SavedAdapter, measure: Measure | None) -> tuple[tuple[Base, ...], str]:
    chosen, reason = default_base(checkpoint, adapter)
    if measure is not None and chosen == "dequantized" and not checkpoint.nf4_weights:
        return ("dequantized", "original"), reason
    return (chosen,), reason


def finite_or_last(loss: float) -> float:
    """What to choose the lowest of: a loss that is no number comes behind all that are."""
    return loss if math.isfinite(loss) else math.inf


def _measured_reason(measured: dict[str, Measured]) -> str:
    losses = ", ".join(f"{base} {found.merged_loss:.4f}" for base, found in measured.items())
    return f"the lower held-out loss of both bases ({losses})"


@dataclass
class _Written:
    """What became of the tensors of one candidate."""

    stats: MergeStats = field(default_factory=MergeStats)
    tensors_changed: int = 0
    output_bytes: int = 0

    def counted(self, merged: MergedTensor) -> Iterator[Tensor]:
        """The blocks of a merged tensor, whose changes are added here."""
        stats = MergeStats()
        for block in merged.blocks:
            stats += block.stats
            yield block.tensor
            del block  # before the next one comes
        self.stats += stats
        self.tensors_changed += stats.touched > stats.swallowed


def _write(plan: MergePlan, writer: ShardWriter, *, progress: bool) -> _Written:
    written = _Written()
    for (key,) in shown([(key,) for key in plan.keys], plan.checkpoint, "Merging", progress=progress):
        for merged in plan.tensors(key):
            writer.add_blocks(merged.name, merged.dtype, merged.shape, written.counted(merged))
    written.output_bytes = writer.total_bytes
    _refuse_unchanged(written.stats, plan.adapter)
    return written


def _write_settings(plan: MergePlan, folder: Path) -> None:
    for source in plan.checkpoint.settings_files:
        if source.name not in (PROVENANCE_FILE, RECORD):
            shutil.copyfile(source, folder / source.name)
    _copy_tokenizer(plan.adapter.folder, folder)
    write_json(folder / "config.json", plan.config())


def _refuse_unchanged(stats: MergeStats, adapter: SavedAdapter) -> None:
    if stats.touched == 0:
        raise UserError("the merge changed no weight: the adapter does nothing", where=adapter.folder, fix="Train it.")
    if stats.touched == stats.swallowed:
        what = (
            f"the merge changed no weight: rounding swallowed every change (the largest is {stats.largest_delta:.1e})"
        )
        raise UserError(what, where=adapter.folder, fix="Merge into a wider dtype: --dtype fp32.")


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer and chat template that the adapter was trained with, in place of the base's."""
    if not (source / "tokenizer_config.json").exists():
        return
    for pattern in _TOKENIZER_FILES:
        for stale in folder.glob(pattern):
            stale.unlink()
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def _keep(aside: Path, chosen: str) -> None:
    """Move the chosen candidate's files up and drop the other's."""
    for path in (aside / chosen).iterdir():
        path.rename(aside / path.name)
    for folder in [path for path in aside.iterdir() if path.is_dir()]:
        shutil.rmtree(folder)


def _record(report: MergeReport, checkpoint: Checkpoint, adapter: SavedAdapter) -> dict[str, Any]:
    provenance = adapter.provenance
    return {
        "model": checkpoint.name,
        "fingerprint": report.fingerprint,
        "adapter": str(adapter.folder),
        "adapter_trained_on": None if provenance is None else provenance.model_dump(),
        "base": report.base,
        "reason": report.reason,
        "dtype": report.dtype,
        "tensors_changed": report.tensors_changed,
        "weights_changed": report.stats.touched - report.stats.swallowed,
        "weights_whose_change_rounding_swallowed": report.stats.swallowed,
        "swallowed_share": report.stats.swallowed_share,
        "largest_delta": report.stats.largest_delta,
        "untied_embeddings": report.untied,
        "measured": {base: vars(found) for base, found in report.measured.items()},
        "versions": installed_versions(),
    }
