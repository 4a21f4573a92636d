"""An adapter merged into a model that is then held in NF4: from original weights plus B A, not from rounded ones."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nybble.adapters.provenance import Provenance, Rounding
from nybble.adapters.saved import SavedAdapter
from nybble.calibrate.run import Calibration
from nybble.export.merge_plan import Base
from nybble.export.merged import RECORD, Measure, MergeReport, default_base, finite_or_last, merge_checkpoint
from nybble.export.quantized import QuantizeReport, quantize_checkpoint, require_text_for
from nybble.files import put_new_folder, read_json, require_new_folder, write_json
from nybble.models.checkpoint import Checkpoint
from nybble.quant.format import NF4Spec


@dataclass(frozen=True)
class RequantizedReport:
    """The 16-bit merge and what NF4 made of it. loss: held-out, of the 4-bit folder, if data were given."""

    merged: MergeReport
    quantized: QuantizeReport
    loss: float | None


def merge_to_nf4(
    checkpoint: Checkpoint,
    adapter: SavedAdapter,
    output: Path,
    spec: NF4Spec,
    *,
    base: Base | None = None,
    rounding: Rounding = "search",
    calibration: Calibration | None = None,
    device: torch.device,
    measure: Measure | None = None,
    progress: bool = False,
    trust_remote_code: bool = False,
) -> RequantizedReport:
    """Merge `adapter` into `checkpoint` as `merge_checkpoint` does, and write the result in NF4 into `output`.

    base: None is the original weights where the checkpoint has them, else what it was dequantized to; with `measure`
    both are tried where the adapter was trained on what NF4 makes of them, and the better in NF4 is kept. The merged
    model lies beside `output` in 16 bit meanwhile, which takes that much disk. merge.json has the losses.
    Raises UserError as merging and quantizing do.
    """
    require_new_folder(output)
    require_text_for(rounding, calibration)

    def made(folder: Path, base: Base, reason: str) -> RequantizedReport:
        between = folder.with_name(f".{folder.name}.merged")
        shutil.rmtree(between, ignore_errors=True)
        try:
            merged = merge_checkpoint(
                checkpoint,
                adapter,
                between,
                base=base,
                reason=reason,
                device=device,
                measure=measure,
                progress=progress,
                trust_remote_code=trust_remote_code,
            )
            whole = replace(Checkpoint.open(str(between)), name=f"{checkpoint.name} with {adapter.folder} merged")
            quantized = quantize_checkpoint(
                whole,
                folder,
                spec,
                device=device,
                rounding=rounding,
                calibration=calibration,
                progress=progress,
                trust_remote_code=trust_remote_code,
            )
            loss = measure.outputs(folder).loss if measure is not None else None
            provenance = Provenance.read(folder)
            assert provenance is not None  # quantizing writes it
            provenance.model_copy(update={"base_kept": False}).write(folder)
            record = {**read_json(between / RECORD), "storage": "nf4", "rounding": rounding, "nf4_loss": loss}
            write_json(folder / RECORD, record)
        finally:
            shutil.rmtree(between, ignore_errors=True)
        return RequantizedReport(merged, quantized, loss)

    bases, reason = _bases(checkpoint, adapter, base, measured=measure is not None)
    folders = {base: output.with_name(f".{output.name}.{base}") for base in bases}
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)
    try:
        reports = {base: made(folder, base, reason) for base, folder in folders.items()}
        chosen = bases[0]
        if len(bases) > 1:
            chosen, reason = _better(reports)
            record = folders[chosen] / RECORD
            write_json(record, {**read_json(record), "reason": reason})
        put_new_folder(folders[chosen], output)
    finally:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
    report = reports[chosen]
    merged, quantized = replace(report.merged, output=output, reason=reason), replace(report.quantized, output=output)
    return RequantizedReport(merged, quantized, report.loss)


def _bases(
    checkpoint: Checkpoint, adapter: SavedAdapter, base: Base | None, *, measured: bool
) -> tuple[tuple[Base, ...], str]:
    """What the adapter is merged into, and why; both bases where the better one is to be found by measuring."""
    if base is not None:
        return (base,), "asked for"
    default, reason = default_base(checkpoint, adapter)
    if checkpoint.nf4_weights:
        return (default,), reason
    if measured and default == "dequantized":
        return ("original", "dequantized"), ""
    return ("original",), "they are rounded to 4 bits once, with the adapter in them"


def _better(reports: Mapping[Base, RequantizedReport]) -> tuple[Base, str]:
    """The base of the lower loss in NF4, and that as the reason."""
    losses = {base: report.loss for base, report in reports.items() if report.loss is not None}
    listed = ", ".join(f"{base} {loss:.4f}" for base, loss in losses.items())
    reason = f"the lower held-out loss in NF4 of both bases ({listed})"
    return min(losses, key=lambda base: finite_or_last(losses[base])), reason
