"""How a merged model differs from its adapter, on held-out rows: what `nybble merge --data` measures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nybble.adapters.saved import read_adapter
from nybble.data.config import DataConfig
from nybble.data.example import Example
from nybble.evaluation.held_out import held_out_batches, held_out_examples
from nybble.export.measure import ModelOutputs, measure_outputs
from nybble.export.merged import Measure, MergeReport
from nybble.export.requantized import RequantizedReport
from nybble.inference import load_for_inference
from nybble.models.checkpoint import Checkpoint
from nybble.models.config import ModelConfig
from nybble.units import format_bytes, format_seconds

# Of the changes; after short runs or at low learning rates most can be less than half a step of the result's dtype.
_MUCH = 0.5


def measure_merge(model: ModelConfig, adapter: Path, data: DataConfig, *, batch_size: int = 4) -> Measure:
    """Run the adapter on the base that it was trained on; `merge_checkpoint` compares merged folders with the result.

    The rows are the held-out ones of `data`, or all where it holds none out.
    """
    return measure_on(model, adapter, held_out_examples(model, adapter, data), batch_size=batch_size)


def measure_on(model: ModelConfig, adapter: Path, examples: Sequence[Example], *, batch_size: int) -> Measure:
    """The same on these rows."""
    loaded = load_for_inference(_as_trained(model, adapter), adapter)
    batches = held_out_batches(loaded, examples, batch_size)
    reference = measure_outputs(loaded.model, batches)

    def outputs(folder: Path) -> ModelOutputs:
        merged = model.model_copy(update={"name": str(folder), "revision": None, "storage": "auto"})
        return measure_outputs(load_for_inference(merged).model, batches)

    return Measure(outputs, reference)


def _as_trained(model: ModelConfig, adapter: Path) -> ModelConfig:
    """The base that the adapter names, where `model` is its original: codes for a text are in that folder alone."""
    origin = read_adapter(adapter).provenance
    if origin is None or not origin.belongs_to_nf4 or origin.calibration is None:
        return model
    given = Checkpoint.open(model.name, model.revision, trust_remote_code=model.trust_remote_code)
    return model if given.nf4_weights else model.model_copy(update={"name": origin.base, "revision": origin.revision})


def describe_merge(report: MergeReport) -> list[str]:
    """What was merged into what and why, and what was measured; a line for each."""
    lines = [f"merged into the {report.base} weights: {report.reason}"]
    lines += [
        f"  {base}: held-out loss {found.merged_loss:.4f}, the adapter's {found.adapter_loss:.4f}; "
        f"largest logit gap {found.largest_logit_gap:.3g}"
        for base, found in report.measured.items()
    ]
    if report.stats.swallowed_share > _MUCH:
        lost = f"{report.stats.swallowed_share:.0%} of the weights that the adapter changes do not change"
        lines.append(f"  note: {lost}, rounded to {report.dtype}; --dtype fp32 keeps what is lost")
    size, seconds = format_bytes(report.output_bytes), format_seconds(report.seconds)
    return [*lines, f"written to {report.output} ({size}) in {seconds}"]


def describe_requantized(report: RequantizedReport) -> list[str]:
    """The same of a merge that was brought into NF4."""
    bits, rounding = report.quantized.bits_per_weight, report.quantized.rounding
    lines = describe_merge(report.merged)[:-1]
    lines.append(f"then rounded to NF4 by {rounding}, {bits:.3f} bits a weight")
    if report.loss is not None:
        lines[-1] += f": held-out loss {report.loss:.4f}"
    lines += report.quantized.notes
    seconds = format_seconds(report.merged.seconds + report.quantized.seconds)
    return [*lines, f"written to {report.merged.output} ({format_bytes(report.quantized.output_bytes)}) in {seconds}"]
