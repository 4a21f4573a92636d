"""`nybble merge`: an adapter into the weights of its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from nybble.cli.options import AsJson, Data, Model, Output, Settings, print_json, read_settings


def merge(
    adapter: Annotated[Path, typer.Option("--adapter", "-a", help="Adapter folder, or the run folder that holds it.")],
    output: Output,
    model: Model = None,
    base: Annotated[
        Literal["original", "dequantized"] | None,
        typer.Option(help="Which weights to add to."),
    ] = None,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None,
        typer.Option(help="Of the result; each tensor's own if left out."),
    ] = None,
    data: Data = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Write a model with the adapter in its weights.

    Some rows are in memory at a time. The model defaults to the base that
    the adapter names. With --data the merged model is measured against the
    adapter; for an adapter trained on NF4, unless --base says otherwise,
    both bases are tried and the better one is kept. merge.json records it.
    """
    from nybble.adapters.saved import read_adapter
    from nybble.compare.merge_check import describe_merge, measure_merge
    from nybble.export.merged import RECORD, merge_checkpoint
    from nybble.files import require_absent
    from nybble.models.checkpoint import Checkpoint
    from nybble.models.dtypes import DTYPES, resolve_device

    require_absent(output)  # before anything is measured
    saved = read_adapter(adapter)
    name = model or saved.base_model_name
    run = read_settings(None, settings, model__name=name, data__path=data or ".", output=str(output))
    trusted = run.model.trust_remote_code
    report = merge_checkpoint(
        Checkpoint.open(run.model.name, run.model.revision, trust_remote_code=trusted),
        saved,
        output,
        base=base,
        dtype=DTYPES[dtype] if dtype else None,
        device=resolve_device(),
        measure=measure_merge(run.model, adapter, run.data, batch_size=run.train.batch_size) if data else None,
        progress=not as_json,
        trust_remote_code=trusted,
    )
    if as_json:
        print_json(json.loads((output / RECORD).read_text(encoding="utf-8")))
        return
    for line in describe_merge(report):
        typer.echo(line)
