"""What was laid down before the first run: kept in the output folder, so that no result can choose it afterwards."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

from pydantic import TypeAdapter

from nybble.compare.folder import FILE as RECORD
from nybble.compare.folder import RunFolder
from nybble.compare.layout import Layout
from nybble.compare.result import Statement
from nybble.errors import UserError, listed
from nybble.evaluation.intervals import LEVEL
from nybble.files import read_json, write_json

FILE = "statement.json"
_STATEMENT = TypeAdapter(Statement)


def state(layout: Layout, *, replaced: bool = False) -> Statement:
    """Write what the comparison lays down, or check it against what was laid down before; returns what holds.

    Once there are results, margin and reference stay what they were (UserError), unless all is `replaced`; more seeds
    or learning rates are noted as a change.
    """
    compare, output = layout.compare, layout.output
    now = datetime.now(UTC).isoformat(timespec="seconds")
    stated = Statement(
        compare.reference_name, compare.margin, LEVEL, layout.seeds, compare.learning_rates, stated_at=now
    )
    before = read_statement(output)
    if before is not None and not replaced and _has_results(output):
        stated = _amended(before, stated, output)
    write_json(output / FILE, asdict(stated))
    return stated


def read_statement(output: Path) -> Statement | None:
    file = output / FILE
    return _STATEMENT.validate_python(read_json(file)) if file.exists() else None


def _has_results(output: Path) -> bool:
    """Whether any run below gave one, be its arm among those of this call or not: what was seen was seen."""
    return any(RunFolder(record.parent).measured for record in output.rglob(RECORD))


def _amended(before: Statement, after: Statement, output: Path) -> Statement:
    fixed = {"margin": (before.margin, after.margin), "reference": (before.reference, after.reference)}
    problems = [f"{name} was {old!r} and is {new!r}" for name, (old, new) in fixed.items() if old != new]
    if problems:
        what = listed("was laid down otherwise, and results are there since:", problems)
        fix = "Leave them as they were, or begin in another output folder."
        raise UserError(what, where=output / FILE, fix=fix)
    varied = {
        "seeds": (before.seeds, after.seeds),
        "learning rates": (before.learning_rates, after.learning_rates),
    }
    changes = [
        f"{after.stated_at}: {name} were {list(old)} and are {list(new)}"
        for name, (old, new) in varied.items()
        if old != new
    ]
    return replace(after, stated_at=before.stated_at, changes=(*before.changes, *changes))
