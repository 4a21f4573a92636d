"""Train the study's grid, as far as a time allows, and keep what is known after each job.

    PYTHONPATH=src:benchmarks python3 studies/train_grid.py --time-limit 480              on all GPUs
    PYTHONPATH=src:benchmarks python3 studies/train_grid.py --small --output runs/small   on two cores, for a trial

The same command goes on where an earlier one stopped: from the work folder if it is there, else from what was kept.
--model names a checkpoint folder where the demo's model cannot be fetched; --parts chooses parts by their names.
A job keeps a GPU busy half of its time: --at-once has several share one, whose speeds and peaks then are no figures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from grid import Part, grid, priced, small
from jobs import IMPORTED, Figures, Job, run_jobs
from parts import (
    CALIBRATION_TOKENS,
    NO_LIMIT_S,
    begin,
    find_machine,
    jobs_of,
    keep,
    layout_of,
    model_folder,
    prepare_base,
    prepared_folder,
)

from nybble.compare.layout import Layout
from nybble.compare.result import Machine
from nybble.demo.model import demo_model
from nybble.files import cache_folder

# By the process that all jobs are forked from, which begins with the first of them.
_IMPORTED = [*IMPORTED, "nybble.compare.worker"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="checkpoint folder; left out: the demo's model")
    parser.add_argument("--parts", nargs="+", help="names; left out: all")
    parser.add_argument("--small", action="store_true", help="two seeds and few steps, of the parts on quality")
    parser.add_argument("--gpus", nargs="+", type=int, help="their numbers; default: all")
    parser.add_argument("--at-once", type=int, default=1, help="jobs on each GPU")
    parser.add_argument("--time-limit", type=float, default=1e9, help="seconds for this call")
    parser.add_argument("--work", type=Path, help="folder for models and runs")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/study"))
    options = parser.parse_args()
    deadline = time.monotonic() + options.time_limit
    work = options.work or Path("runs/study-small" if options.small else "runs/study")
    gpus = options.gpus or list(range(torch.cuda.device_count())) or [None]
    parts = chosen(work, options.parts, is_small=options.small)
    print("\n".join(priced(parts)), flush=True)
    bring_model(work, options.model)
    kinds = list(dict.fromkeys(part.data.kind for part in parts))
    prepare(work, kinds, gpus * options.at_once, tokens=8192 if options.small else CALIBRATION_TOKENS)
    [found] = needed([Job("machine", find_machine, (), NO_LIMIT_S)], gpus[:1])
    train(parts, work, gpus * options.at_once, options.output, deadline, found["machine"])


def chosen(work: Path, names: Sequence[str] | None, *, is_small: bool) -> list[Part]:
    every = grid(lambda kind: str(prepared_folder(work, kind)))
    every = small(every) if is_small else every
    unknown = set(names or ()) - {part.name for part in every}
    if unknown:
        raise SystemExit(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(p.name for p in every)}")
    return [part for part in every if names is None or part.name in names]


def bring_model(work: Path, given: Path | None) -> None:
    """Below the work folder, so that settings and records name no place of this machine."""
    folder = model_folder(work)
    if not folder.exists():
        work.mkdir(parents=True, exist_ok=True)
        folder.symlink_to((given or demo_model(cache_folder())).resolve(), target_is_directory=True)


def prepare(work: Path, kinds: Sequence[str], gpus: Sequence[int | None], *, tokens: int) -> None:
    """The bases of these kinds, where they are not there."""
    left = [kind for kind in kinds if not prepared_folder(work, kind).exists()]
    jobs = [Job(f"{kind}: base", prepare_base, (work, kind, tokens), NO_LIMIT_S) for kind in left]
    for figures in needed(jobs, gpus):
        cost = f"{figures['seconds']:.0f} s, {figures['tokens']:,} tokens, {figures['bits_per_weight']:.3f} bits"
        print(f"{figures['row']}: {cost}", flush=True)


def needed(jobs: Sequence[Job], gpus: Sequence[int | None]) -> Iterator[Figures]:
    """Figures of jobs that all others need; ends the program if one fails."""
    for figures in run_jobs(jobs, gpus, time_limit_s=1e9, imported=_IMPORTED):
        if "error" in figures:
            raise SystemExit(figures["error"])
        yield figures


def train(
    parts: Sequence[Part],
    work: Path,
    gpus: Sequence[int | None],
    output: Path,
    deadline: float,
    machine: Machine,
) -> None:
    layouts = {part.name: layout_of(part, work) for part in parts}
    jobs: list[Job] = []
    for part in parts:
        begin(layouts[part.name], output / f"{part.name}.json")
        jobs += jobs_of(part, layouts[part.name])
    left = deadline - time.monotonic()
    for figures in run_jobs(jobs, gpus, time_limit_s=left, imported=_IMPORTED):
        show(figures)
        name = figures["row"].partition(":")[0]
        keep(layouts[name], output / f"{name}.json", machine)
    report(layouts, output, machine)


def show(figures: Figures) -> None:
    outcome = figures.get("error") or f"{figures['seconds']:.0f} s"
    print(f"{figures['row']}: {outcome.strip().splitlines()[-1]}", flush=True)


def report(layouts: dict[str, Layout], output: Path, machine: Machine) -> None:
    for name, layout in layouts.items():
        comparison = keep(layout, output / f"{name}.json", machine)
        for arm in comparison.arms:
            loss = "-" if arm.loss_after is None else f"{arm.loss_after:.4f}"
            found = comparison.difference(arm.name)
            gap = f"{found.mean:+.4f} [{found.interval.low:+.4f}, {found.interval.high:+.4f}]" if found else ""
            rate = f"{arm.learning_rate:g}" if arm.learning_rate else "-"
            print(f"{name:<20}{arm.name:<15}{rate:>7}{loss:>9} {gap}  {arm.status} {arm.error or ''}"[:160], flush=True)


if __name__ == "__main__":
    main()
