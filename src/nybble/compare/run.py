"""A comparison: arms that share a base are trained over one copy of it, in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from pathlib import Path

from rich.console import Console

from nybble.compare.assemble import assemble
from nybble.compare.config import Arm, CompareConfig
from nybble.compare.folder import Failure
from nybble.compare.interrupts import NotedInterrupts
from nybble.compare.layout import Layout
from nybble.compare.report.write import write_report
from nybble.compare.result import Comparison
from nybble.compare.rows import require_held_out_rows
from nybble.compare.statement import state
from nybble.compare.worker import by_base, run_arms
from nybble.config import RunConfig
from nybble.errors import UserError, listed
from nybble.files import check_writable, write_text
from nybble.train.output import require_no_run

_KILLED = Failure(
    "its process was ended from outside, as systems do when memory runs out",
    fix="Lower train.batch_size or data.max_length, then run the same command again: finished runs are kept.",
)


def compare_arms(
    config: RunConfig,
    compare: CompareConfig,
    *,
    replace: bool = False,
    quiet: bool = False,
    command: str | None = None,
) -> Comparison:
    """Train `config` once for each arm and seed, with what the arm changes alone changed, and measure the results.

    Runs that an earlier call finished are kept, unfinished ones are resumed; those begun with other settings are an
    error, or with `replace` done anew. An arm that fails is reported, and the others go on; what failed is tried again
    by the next call, unless a loss of training was not finite. The result is written to `comparison.json`, and to
    report.html and report.md for people. A script that
    calls this needs `if __name__ == "__main__":`, as the processes import it.
    Raises UserError for settings that are not valid, and when no arm gave a result.
    """
    require_held_out_rows(config.data, compare.test)
    output = Path(config.output).expanduser()
    require_no_run(output)
    check_writable(output)
    layout = Layout(config, compare, output)
    statement = state(layout, replaced=settle_changes(layout, replace=replace))
    write_text(output / "config.yaml", config.to_yaml())
    for run in layout.all_runs():
        run.folder.forgive()
    for arms in by_base(layout):
        _run_together(layout, arms, quiet=quiet)
    comparison = assemble(layout, statement, command=command)
    comparison.write(output)
    write_report(comparison, output)
    _require_a_result(layout, comparison)
    return comparison


def settle_changes(layout: Layout, *, replace: bool = False) -> bool:
    """Whether runs that were begun with other settings, rows or weights were removed; UserError if they must not be."""
    changed = {path: names for arm in layout.compare.arms for path, names in _changes(layout, arm)}
    if changed and not replace:
        lines = [f"{path}: {', '.join(names)}" for path, names in changed.items()]
        what = listed("runs were begun with other settings, rows or weights:", lines, most=8)
        raise UserError(what, where="compare", fix="Choose another output folder, or remove those.")
    for path in changed:
        shutil.rmtree(path)
    return bool(changed)


def _changes(layout: Layout, arm: Arm) -> list[tuple[Path, list[str]]]:
    """Folders of runs of `arm`, and what each was begun with that is something else now."""
    begun = [run.folder for run in layout.runs_of(arm) if run.folder.begun]
    now = layout.contents(arm) if begun else {}
    found = [(folder.path, [*folder.changed_settings(), *folder.changed_contents(now)]) for folder in begun]
    return [(path, names) for path, names in found if names]


def _run_together(layout: Layout, arms: Sequence[Arm], *, quiet: bool) -> None:
    """Run the arms in a process; if that is killed, give up the run it was at and go on with the others."""
    console = Console(stderr=True, quiet=quiet, soft_wrap=True, highlight=False)
    while not _get_through(layout, arms, quiet=quiet):
        at_work = [run for arm in arms for run in layout.runs_of(arm) if run.folder.in_progress]
        if not at_work:
            raise UserError(_KILLED.what, where=f"arm {arms[0].name}", fix=_KILLED.fix)
        for run in at_work:
            run.folder.fail(_KILLED)
            console.print(f"failed: {run.title}: {_KILLED.what}", style="red", markup=False)


def _get_through(layout: Layout, arms: Sequence[Arm], *, quiet: bool) -> bool:
    """Run the arms in a process; False if that was killed, KeyboardInterrupt once it has ended by Ctrl-C."""
    # spawn, not fork: a forked process would begin with this one's memory, and CUDA does not survive a fork.
    spawn, killed = multiprocessing.get_context("spawn"), False
    with NotedInterrupts() as interrupts, ProcessPoolExecutor(1, spawn, initializer=_end_with_parent) as pool:
        try:
            pool.submit(run_arms, layout, arms, quiet=quiet).result()
        except BrokenProcessPool:
            killed = True
        except KeyboardInterrupt:  # the process's own
            interrupts.note()
    if interrupts.came:
        raise KeyboardInterrupt("run the same command again to go on")
    return not killed


def _end_with_parent() -> None:
    """In a process of arms: once the process that started it is gone, stop as after Ctrl-C, with a checkpoint."""

    def wait(parent: BaseProcess) -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, args=(multiprocessing.parent_process(),), daemon=True).start()


def _require_a_result(layout: Layout, comparison: Comparison) -> None:
    if any(arm.finished for arm in comparison.arms):
        return
    failures = [failure for run in layout.all_runs() if (failure := run.folder.failure)]
    if failures:
        raise failures[0].error()
