"""Speed and memory of a training step, one process a row, nybble and PEFT in turn on the same card.

python benchmarks/train_step.py --model FOLDER [--rows "qlora 4 2048 recompute" ...] --output FILE
`benchmarks/make_model.py 8b FOLDER` writes the model. Tokens a second is of the median step after three warm-up steps.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from results import received_row, send_row, write_result
from stacks import STACKS, Work

ROWS = ["qlora 4 2048 recompute", "lora 4 2048 recompute", "qlora 1 2048 recompute"]
WARM_UP = 3


def measure(stack: str, row: str, model: str, steps: int) -> dict[str, object]:
    method, batch, seq_len, activations = row.split()
    shape = (steps + WARM_UP, int(batch), int(seq_len))
    windows = torch.randint(10, 250, shape, generator=torch.Generator().manual_seed(0))
    work = Work(model, method, windows, checkpointing=activations == "recompute")
    torch.cuda.reset_peak_memory_stats()
    loaded = STACKS[stack](work)
    load_peak = torch.cuda.max_memory_allocated()
    records = []
    for index, record in enumerate(loaded.steps):
        records.append(record)
        if index + 1 == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
    seconds = sorted(record.seconds for record in records[WARM_UP:])
    return {
        "stack": stack,
        "row": row,
        "tokens_per_second": round(shape[1] * shape[2] / statistics.median(seconds)),
        "step_seconds": [round(s, 4) for s in seconds],
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "resident_gib": round(loaded.resident_bytes / 2**30, 2),
        "load_seconds": round(loaded.load_seconds, 1),
        "load_peak_gib": round(load_peak / 2**30, 2),
        "trainable": loaded.trainable,
        "loss": [round(record.loss, 4) for record in records],
        "grad_norm": [round(record.grad_norm, 4) for record in records],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--stacks", nargs="+", default=["peft", "nybble"], choices=list(STACKS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/step_8b.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        send_row(measure(options.one, options.rows[0], options.model, options.steps))
        return
    rows = []
    for row in options.rows:
        for stack in options.stacks:
            command = [sys.executable, __file__, "--model", options.model, "--steps", str(options.steps)]
            done = subprocess.run([*command, "--one", stack, "--rows", row], capture_output=True, text=True)
            figures = received_row(done.stdout)
            if done.returncode or figures is None:
                print(f"FAILED {stack} {row}\n{done.stderr[-1500:]}", flush=True)
                continue
            rows.append(figures)
            shown = ("tokens_per_second", "peak_allocated_gib", "resident_gib", "load_seconds", "load_peak_gib")
            print(f"{stack:7} {row:24}", {k: figures[k] for k in shown}, figures["loss"][-1], flush=True)
            write_result(options.output, rows)


if __name__ == "__main__":
    main()
