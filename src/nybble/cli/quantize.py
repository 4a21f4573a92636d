"""`nybble quantize`: a checkpoint in NF4, as bitsandbytes writes it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

import typer

from nybble.cli.options import (
    AsJson,
    CalibrationPath,
    CalibrationTokens,
    ConfigFile,
    Model,
    Output,
    Settings,
    print_json,
    read_calibration,
    read_settings,
)
from nybble.units import format_bytes, format_count, format_seconds


def quantize(
    output: Output,
    config: ConfigFile = None,
    model: Model = None,
    rounding: Annotated[
        Literal["nearest", "search", "weighted", "compensated"] | None,
        typer.Option(help="How codes are chosen; with --calibration compensated if left out, else model.rounding."),
    ] = None,
    calibration: CalibrationPath = None,
    calibration_tokens: CalibrationTokens = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Write a model with its linear layers in 4 bits (NF4).

    The folder is in bitsandbytes' format: Transformers loads it, and so
    does nybble. nearest rounds as bitsandbytes does; search chooses scales
    for the least error of the weights; weighted and compensated for that
    of the layers' outputs on --calibration, where compensated makes up for
    earlier layers as well, weighs tokens by how far predictions depend on
    them, and then tunes all scales together. A correction for adapters to
    start from is made too. Broken off, it goes on where it was.
    """
    run = read_settings(config, settings, model__name=model, data__path=".", output=str(output))

    from nybble.export.quantized import quantize_checkpoint, require_not_quantized
    from nybble.files import require_new_folder
    from nybble.models.checkpoint import Checkpoint
    from nybble.models.dtypes import resolve_device
    from nybble.quant.format import NF4Spec

    require_new_folder(output)  # before a long text is tokenized
    spec = NF4Spec.of(run.model.block_size, double_quant=run.model.double_quant)
    trusted = run.model.trust_remote_code
    checkpoint = Checkpoint.open(run.model.name, run.model.revision, trust_remote_code=trusted)
    require_not_quantized(checkpoint)
    seen = read_calibration(calibration, calibration_tokens, checkpoint, trust_remote_code=trusted)
    report = quantize_checkpoint(
        checkpoint,
        output,
        spec,
        device=resolve_device(),
        rounding=rounding or ("compensated" if seen else run.model.rounding),
        calibration=seen,
        progress=not as_json,
        trust_remote_code=trusted,
    )
    if as_json:
        print_json(asdict(report))
        return
    typer.echo(
        f"{format_count(report.quantized_weights)} weights in {report.bits_per_weight:.3f} bits each; "
        f"{format_bytes(report.source_bytes)} -> {format_bytes(report.output_bytes)} "
        f"in {format_seconds(report.seconds)}"
    )
    for note in report.notes:
        typer.echo(note)
    seen_text = f", calibrated on {format_count(report.calibration_tokens)} tokens" if report.calibration_tokens else ""
    typer.echo(f"rounding: {report.rounding}{seen_text}")
    typer.echo(f"written to {report.output}")
