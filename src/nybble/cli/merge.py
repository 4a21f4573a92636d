"""`nybble merge`: an adapter into the weights of its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from nybble.cli.options import (
    AsJson,
    CalibrationPath,
    CalibrationTokens,
    Data,
    Model,
    Output,
    Settings,
    print_json,
    read_calibration,
    read_settings,
)
from nybble.errors import UserError


def merge(
    adapter: Annotated[Path, typer.Option("--adapter", "-a", help="Adapter folder, or the run folder that holds it.")],
    output: Output,
    model: Model = None,
    base: Annotated[
        Literal["original", "dequantized"] | None,
        typer.Option(help="What to add the adapter to: the model's own weights, or what NF4 makes of them."),
    ] = None,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None,
        typer.Option(help="Of the result; each tensor's own if left out."),
    ] = None,
    storage: Annotated[
        Literal["16bit", "nf4"], typer.Option(help="nf4: the merged weights in 4 bits, by --rounding.")
    ] = "16bit",
    rounding: Annotated[
        Literal["nearest", "search", "weighted", "compensated"] | None,
        typer.Option(
            help="How codes of --storage nf4 are chosen; with --calibration compensated if left out, else search."
        ),
    ] = None,
    calibration: CalibrationPath = None,
    calibration_tokens: CalibrationTokens = None,
    data: Data = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Write a model with the adapter in its weights.

    Some rows are in memory at a time. The model defaults to the base that
    the adapter names. With --data the merged model is measured against the
    adapter; for an adapter trained on NF4, unless --base says otherwise,
    both bases are tried and the better one is kept. merge.json records it.
    In nf4 the result is made of the original weights and the adapter, not
    of weights that were rounded before, unless --data or --base says so.
    """
    from nybble.adapters.saved import read_adapter
    from nybble.compare.merge_check import describe_merge, describe_requantized, measure_merge
    from nybble.export.merged import RECORD, merge_checkpoint
    from nybble.export.quantized import require_text_for
    from nybble.export.requantized import merge_to_nf4
    from nybble.files import require_new_folder
    from nybble.models.checkpoint import Checkpoint
    from nybble.models.dtypes import DTYPES, resolve_device
    from nybble.quant.format import NF4Spec

    require_new_folder(output)  # before anything is measured
    if storage == "nf4" and dtype:
        raise UserError("the result is in nf4", where="--dtype", fix="Leave out one of --dtype and --storage.")
    of_nf4 = {"--rounding": rounding, "--calibration": calibration, "--calibration-tokens": calibration_tokens}
    if storage != "nf4" and (unused := [option for option, value in of_nf4.items() if value is not None]):
        fix = "Add --storage nf4, or leave them out."
        raise UserError("says how weights become 4 bits, and the result is in 16", where=", ".join(unused), fix=fix)
    saved = read_adapter(adapter)
    given = {"model__name": model, "data__path": data or ".", "output": str(output)}
    run = read_settings(None, settings, adapter=adapter, **given)
    trusted = run.model.trust_remote_code
    checkpoint = Checkpoint.open(run.model.name, run.model.revision, trust_remote_code=trusted)
    seen = read_calibration(calibration, calibration_tokens, checkpoint, trust_remote_code=trusted)
    rounding = rounding or ("compensated" if seen else "search")
    if storage == "nf4":
        require_text_for(rounding, seen)
    measure = measure_merge(run.model, adapter, run.data, batch_size=run.train.batch_size) if data else None
    if storage == "nf4":
        requantized = merge_to_nf4(
            checkpoint,
            saved,
            output,
            NF4Spec.of(run.model.block_size, double_quant=run.model.double_quant),
            base=base,
            rounding=rounding,
            calibration=seen,
            device=resolve_device(),
            measure=measure,
            progress=not as_json,
            trust_remote_code=trusted,
        )
        lines = describe_requantized(requantized)
    else:
        report = merge_checkpoint(
            checkpoint,
            saved,
            output,
            base=base,
            dtype=DTYPES[dtype] if dtype else None,
            device=resolve_device(),
            measure=measure,
            progress=not as_json,
            trust_remote_code=trusted,
        )
        lines = describe_merge(report)
    if as_json:
        print_json(json.loads((output / RECORD).read_text(encoding="utf-8")))
        return
    for line in lines:
        typer.echo(line)
