"""The folder of a run: claimed before anything is computed, so that no run overwrites another."""

from __future__ import annotations

from pathlib import Path

from nybble.errors import UserError
from nybble.files import check_writable, explain_write_errors, read_json

# What tells a run's folder. Anything else in the folder is left alone.
_TRACES = ("run.json", "log.jsonl", "checkpoints", "adapter", "model")
_COMPARISON = "statement.json"  # and a comparison's, whose runs have folders of their own in it


def claim_output(output: Path, *, resume: bool) -> None:
    """Raise UserError unless a run may write here: an empty or new folder, or with `resume` one that holds a run."""
    with explain_write_errors(output):
        if (output / _COMPARISON).exists():
            raise UserError("holds a comparison", where=output, fix="Choose another output folder.")
        held = [name for name in _TRACES if (output / name).exists()]
    if held and not resume:
        fix = "Choose another output folder."
        if not _is_finished(output):
            fix = f"Go on with `nybble train {output / 'config.yaml'} --resume`, or choose another output folder."
        raise UserError(f"holds another run ({', '.join(held)})", where=output, fix=fix)
    if resume and not held:
        raise UserError("holds no run that could be resumed", where=output, fix="Leave out --resume.")
    if resume and _is_finished(output):
        raise UserError("this run is finished", where=output, fix="Start another one in a new output folder.")
    check_writable(output)


def require_no_run(output: Path) -> None:
    """Raise UserError if a run was begun in this very folder: its settings would be overwritten by a comparison's."""
    with explain_write_errors(output):
        if (output / "run.json").exists():
            raise UserError("holds a run", where=output, fix="Choose another output folder.")


def _is_finished(output: Path) -> bool:
    record = output / "run.json"
    return record.exists() and read_json(record).get("status") == "finished"
