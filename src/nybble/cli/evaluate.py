"""`nybble eval`: held-out loss of a model, with or without an adapter."""

from __future__ import annotations

from dataclasses import asdict

import typer

from nybble.cli.options import Adapter, AsJson, ConfigFile, Data, Model, Settings, print_json, read_settings


def evaluate(
    config: ConfigFile = None,
    model: Model = None,
    data: Data = None,
    adapter: Adapter = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Measure the loss on held-out rows.

    These are the valid file of a data folder, or what the settings hold
    out, or else all rows of the data.
    """
    run = read_settings(config, settings, model__name=model, data__path=data, output=".")

    from nybble.compare.held_out import held_out_loss

    result = held_out_loss(run.model, run.data, adapter=adapter, batch_size=run.train.batch_size, progress=not as_json)
    if as_json:
        print_json(asdict(result))
        return
    typer.echo(f"held-out loss {result.loss:.4f} nats a token (perplexity {result.perplexity:.2f})")
    typer.echo(
        f"{result.rows} rows, {result.target_tokens} target tokens, {result.tokens_per_second:.0f} a second, "
        f"weights held in {result.storage}"
    )
