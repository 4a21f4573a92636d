"""Speed and memory of a training step, nybble and its peers in turn on the same card.

python benchmarks/train_step.py --model FOLDER [--rows "qlora bf16 4 2048 keep" ...] [--stacks nybble unsloth ...]
`benchmarks/make_model.py 8b FOLDER` writes the model. A row is METHOD PRECISION BATCH SEQ ACTIVATIONS [STATE_BITS].
Tokens a second is of the median step after five steps of warm-up. Each row has a process of its own; with --share-load,
rows of a stack that can do with one load of the model have one process, and what it leaves behind has another.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from results import card_name, received_rows, send_row, write_result
from stacks import EXAMPLE, STACKS, Adapter, Row, Stack, can_run, installed, load_key

ROWS = [
    "qlora bf16 4 2048 keep",
    "lora bf16 4 2048 keep",
    "qlora bf16 4 2048 offload",
    "qlora bf16 1 2048 keep",
    "qlora bf16 1 2048 offload 8",
    "qlora bf16 2 4096 keep",
    "lora bf16 2 4096 keep",
    "qlora fp8 4 2048 keep",
    "qlora fp8 1 2048 keep",
]
WARM_UP = 5  # peers compile kernels at the first; nybble launches two, records the third and replays it from there on

Task = tuple[str, Row]
Figures = dict[str, Any]


def measure_tasks(tasks: list[Task], options: argparse.Namespace) -> None:
    """Send a row for each task, all by one load; after one that failed, leave the rest to a fresh process."""
    signal.alarm(options.time_limit)  # which ends the process, wherever it hangs
    name, row = tasks[0]
    try:
        started = time.perf_counter()
        longest = max(row.seq_len for _, row in tasks)
        stack = STACKS[name](options.model, row, Adapter(), longest=longest)
        stack.prepare(row)
        loading = {"load_seconds": round(time.perf_counter() - started, 1), "load_peak_gib": _gib(_peak())}
        for number, (name, row) in enumerate(tasks):
            signal.alarm(options.time_limit)
            if number > 0:
                stack.prepare(row)
            send_row({"stack": name, "row": str(row), **measure(stack, name, row, options.steps), **loading})
    except Exception:
        send_row({"stack": name, "row": str(row), "error": traceback.format_exc()[-1500:]})


def measure(stack: Stack, name: str, row: Row, steps: int) -> Figures:
    # Few distinct tokens: with random weights too, the loss falls as the model learns which there are.
    shape = (WARM_UP + steps, row.batch, row.seq_len)
    windows = torch.randint(10, 250, shape, generator=torch.Generator().manual_seed(0))
    _free()
    resident = torch.cuda.memory_allocated()
    records = []
    for record in stack.steps(row, windows):
        records.append(record)
        # While a graph is replayed its memory is not counted: there, the peak is that of the steps before.
        if len(records) == WARM_UP and name != "nybble" and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
    seconds = [record.seconds for record in records[WARM_UP:]]
    return {
        "tokens_per_second": round(row.tokens / statistics.median(seconds)),
        "step_seconds": [round(s, 4) for s in seconds],
        "peak_allocated_gib": _gib(_peak()),
        "peak_reserved_gib": _gib(torch.cuda.max_memory_reserved()),
        "device_used_gib": _gib(_used()),
        "resident_gib": _gib(resident),
        "trainable": sum(p.numel() for p in stack.model.parameters() if p.requires_grad),
        "loss": [round(record.loss, 4) for record in records],
        "grad_norm": [round(record.grad_norm, 4) for record in records],
        "notes": stack.notes,
        "device": card_name(),
    }


def _free() -> None:
    """Give back what rows before have left, and forget their peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak() -> int:
    return torch.cuda.max_memory_allocated()


def _used() -> int:
    """Of the whole card: with libraries, graphs and whatever else runs there."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def _gib(count: int) -> float:
    return round(count / 2**30, 2)


def rows_of(tasks: list[Task], options: argparse.Namespace) -> Iterator[Figures]:
    """A row for each of `tasks`, which one process measures, and as many more as end early."""
    command = [sys.executable, __file__, "--model", options.model, "--steps", str(options.steps)]
    command += ["--time-limit", str(options.time_limit), "--tasks"]
    while tasks:
        names, found = [f"{name} {row}" for name, row in tasks], []
        with tempfile.TemporaryFile("w+") as errors:
            with subprocess.Popen([*command, *names], stdout=subprocess.PIPE, stderr=errors, text=True) as process:
                assert process.stdout is not None
                for figures in received_rows(process.stdout):
                    found.append(figures)
                    yield figures
            if len(found) < len(tasks) and not (found and "error" in found[-1]):
                errors.seek(0)
                name, row = tasks[len(found)]
                found.append({"stack": name, "row": str(row)})
                yield found[-1] | {"error": f"exit code {process.returncode}\n{errors.read()[-1500:]}"}
        tasks = tasks[len(found) :]


def grouped(tasks: list[Task], *, share_load: bool) -> list[list[Task]]:
    groups: dict[Any, list[Task]] = {}
    for name, row in tasks:
        groups.setdefault(load_key(name, row) if share_load else (name, row), []).append((name, row))
    return list(groups.values())


def parse_task(text: str) -> Task:
    name, _, row = text.partition(" ")
    return name, Row.parse(row)


def earlier_rows(path: Path, tasks: list[Task]) -> list[Figures]:
    """Rows that are in the file and will not be measured now."""
    if not path.exists():
        return []
    anew = {(name, str(row)) for name, row in tasks}
    return [row for row in json.loads(path.read_text())["rows"] if (row["stack"], row["row"]) not in anew]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", nargs="+", type=Row.parse, default=list(map(Row.parse, ROWS)), metavar=repr(EXAMPLE))
    stacks = [stack for stack in ("nybble", "unsloth", "peft-liger", "peft") if installed(stack)]
    parser.add_argument("--stacks", nargs="+", default=stacks, choices=list(STACKS), help="default: all installed")
    parser.add_argument("--steps", type=int, default=10, help="timed ones")
    parser.add_argument("--share-load", action="store_true")
    parser.add_argument("--time-limit", type=int, default=150, help="seconds for a load and for a row")
    parser.add_argument("--append", action="store_true", help="keep the rows of the file that are not measured now")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/step_8b.json"))
    parser.add_argument("--tasks", nargs="+", type=parse_task, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tasks:
        measure_tasks(options.tasks, options)
        return
    tasks = [(name, row) for row in options.rows for name in options.stacks if can_run(name, row)]
    rows = earlier_rows(options.output, tasks) if options.append else []
    for group in grouped(tasks, share_load=options.share_load):
        for figures in rows_of(group, options):
            if "error" in figures:
                print(f"FAILED {figures['stack']} {figures['row']}\n{figures['error']}", flush=True)
                continue
            rows.append(figures)
            write_result(options.output, rows)
            print_row(figures)


def print_row(figures: Figures) -> None:
    memory = "peak {peak_allocated_gib:6.2f}  used {device_used_gib:6.2f}  resident {resident_gib:6.2f} GiB"
    figure = "{stack:15}{row:30}{tokens_per_second:>8,} tok/s  " + memory + "  load {load_seconds:5.1f} s"
    first, last = (f"{figures['loss'][i]:.3f} (norm {figures['grad_norm'][i]:.2f})" for i in (0, -1))
    print(figure.format(**figures), f" loss {first} -> {last} ", "; ".join(figures["notes"]), flush=True)


if __name__ == "__main__":
    main()
