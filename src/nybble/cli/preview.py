"""`nybble preview`: samples as the model will see them."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from nybble.cli.options import AsJson, ConfigFile, Data, Model, Settings, print_json, read_settings


def preview(
    config: ConfigFile = None,
    model: Model = None,
    data: Data = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=0, help="How many samples to show.")] = 3,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Show samples with their trained tokens in colour.

    And what became of all rows: how many were cut or dropped. No weights
    are loaded.
    """
    run = read_settings(config, settings, model__name=model, data__path=data, output=".")

    from nybble.data.prepare import prepare_data
    from nybble.data.preview import preview_figures, render_preview
    from nybble.models.checkpoint import Checkpoint
    from nybble.models.load import load_tokenizer

    trusted = run.model.trust_remote_code
    checkpoint = Checkpoint.open(run.model.name, run.model.revision, trust_remote_code=trusted)
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trusted)
    prepared = prepare_data(run.data, tokenizer, model_max_length=checkpoint.max_positions, progress=not as_json)
    if as_json:
        print_json(preview_figures(prepared, tokenizer, samples=samples))
    else:
        Console().print(render_preview(prepared, tokenizer, samples=samples))
