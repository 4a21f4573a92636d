"""`nybble quantize`: a checkpoint in NF4, as bitsandbytes writes it."""

from __future__ import annotations

from dataclasses import asdict

import typer

from nybble.cli.options import AsJson, ConfigFile, Model, Output, Settings, print_json, read_settings
from nybble.units import format_bytes, format_count, format_seconds


def quantize(
    output: Output,
    config: ConfigFile = None,
    model: Model = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Write a model with its linear layers in 4 bits (NF4).

    The folder is in bitsandbytes' format: Transformers loads it, and so
    does nybble.
    """
    run = read_settings(config, settings, model__name=model, data__path=".", output=str(output))

    from nybble.export.quantized import quantize_checkpoint
    from nybble.models.checkpoint import Checkpoint
    from nybble.models.dtypes import resolve_device
    from nybble.quant.format import NF4Spec

    spec = NF4Spec.of(run.model.block_size, double_quant=run.model.double_quant)
    trusted = run.model.trust_remote_code
    checkpoint = Checkpoint.open(run.model.name, run.model.revision, trust_remote_code=trusted)
    report = quantize_checkpoint(
        checkpoint, output, spec, device=resolve_device(), progress=not as_json, trust_remote_code=trusted
    )
    if as_json:
        print_json(asdict(report))
        return
    typer.echo(
        f"{format_count(report.quantized_weights)} weights in {report.bits_per_weight:.3f} bits each; "
        f"{format_bytes(report.source_bytes)} -> {format_bytes(report.output_bytes)} "
        f"in {format_seconds(report.seconds)}"
    )
    if report.expert_weights:
        typer.echo(
            f"{format_count(report.expert_weights)} weights of experts stay in {report.kept_dtype}: "
            "only linear layers are quantized, and one tensor holds all experts of a block"
        )
    typer.echo(f"written to {report.output}")
