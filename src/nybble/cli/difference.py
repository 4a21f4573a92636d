"""`nybble difference`: what training changed, as an adapter for the base itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nybble.cli.options import Output


def difference(
    adapter: Annotated[Path, typer.Option("--adapter", "-a", help="Adapter folder, or the run folder that holds it.")],
    output: Output,
) -> None:
    """Save what training changed, as an adapter that any server can load.

    For one that did not begin at zero (lora.init calibrated, pissa or
    loftq): it holds its start too, which on the model's own weights would
    count twice. What is saved has twice the rank, BA - B0 A0.
    """
    from nybble.adapters.difference import save_difference
    from nybble.adapters.saved import read_adapter
    from nybble.files import require_new_folder

    require_new_folder(output)
    saved = read_adapter(adapter)
    save_difference(saved, output)
    typer.echo(f"saved to {output}, rank {2 * saved.config.r}")
