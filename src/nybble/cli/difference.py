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
    """Save an adapter that did not begin at zero as one of twice the rank.

    It holds what training changed (BA - B0 A0) and belongs to the base's own
    weights, on which any server can load it; the adapter itself would count
    its start twice there.
    """
    from nybble.adapters.difference import save_difference
    from nybble.adapters.saved import read_adapter
    from nybble.files import require_absent

    require_absent(output)
    saved = read_adapter(adapter)
    save_difference(saved, output)
    typer.echo(f"saved to {output}, rank {2 * saved.config.r}")
