"""An adapter merged into a model that is then held in NF4: from original weights plus B A, not from rounded ones."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nybble.adapters.provenance import Rounding
from nybble.adapters.saved import SavedAdapter
from nybble.calibrate.run import Calibration
from nybble.export.merge_plan import Base
from nybble.export.merged import RECORD, Measure, MergeReport, merge_checkpoint
from nybble.export.quantized import QuantizeReport, quantize_checkpoint, require_text_for
from nybble.files import read_json, require_new_folder, write_json
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

    base: None is the original weights where the checkpoint has them, else what it was dequantized to. The merged model
    lies beside `output` in 16 bit meanwhile, which takes that much disk. merge.json has both losses with `measure`.
    Raises UserError as merging and quantizing do.
    """
    require_new_folder(output)
    require_text_for(rounding, calibration)
    reason = "asked for"
    if base is None and not checkpoint.nf4_weights:
        base, reason = "original", "they are rounded to 4 bits once, with the adapter in them"
    between = output.with_name(f".{output.name}.merged")
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
            output,
            spec,
            device=device,
            rounding=rounding,
            calibration=calibration,
            progress=progress,
            trust_remote_code=trust_remote_code,
        )
        loss = measure.outputs(output).loss if measure is not None else None
        record = {**read_json(between / RECORD), "storage": "nf4", "rounding": rounding, "nf4_loss": loss}
        write_json(output / RECORD, record)
    finally:
        shutil.rmtree(between, ignore_errors=True)
    return RequantizedReport(replace(merged, output=output), quantized, loss)
