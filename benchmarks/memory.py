"""How little memory a training step needs, and at what speed: each row by a process held to its budget.

python benchmarks/memory.py [--rows "8b 1x2048 memory.budget=5GiB" ...] [--gpus 0 1 2 3] [--time-limit SECONDS]
A row is MODEL BATCHxSEQ SETTING=VALUE...; models are the shapes of shapes.py with random weights, and what the settings
of `memory` leave open is the planner's choice. Peak: what the allocator reserved at most and what else the card shows
in use, context and libraries; a budget holds all of that. Rows that others are compared with come first.
"""

from __future__ import annotations

import argparse

from jobs import Job, add_job_options, write_rows
from work import Work, measure, shown

LEAN = "optim.state_bits=8 memory.embedding=host memory.head=host"
ROWS = [
    # 8B, beside our own step that recomputes and has all that it wants; wholly on the card it needs a little more.
    "8b 1x2048 memory.activations=recompute memory.weights=resident",
    f"8b 1x2048 {LEAN} memory.budget=5GiB",
    f"8b 1x2048 {LEAN} memory.weights=resident memory.budget=5.6GiB",
    f"8b 1x2048 {LEAN} memory.weights=streamed memory.budget=2.5GiB",
    f"8b 1x2048 {LEAN} memory.weights=resident lora.dtype=bf16 memory.budget=5.45GiB",
    f"8b 2x2048 {LEAN} memory.weights=resident memory.budget=6GiB",
    f"8b 2x2048 {LEAN} memory.weights=streamed memory.budget=2.7GiB",
    "8b 4x2048 memory.budget=24GiB",
    # 70B at 4,096 tokens a step: on a card of 80 GB, and streamed.
    "70b 2x2048 memory.budget=79GiB",
    "70b 2x2048 memory.budget=24GiB optim.state_bits=8",
    "70b 2x2048 memory.budget=12GiB optim.state_bits=8",
    # The claim of QLoRA's paper.
    "70b 1x2048 lora.r=64 memory.moments=paged memory.budget=48GiB",
    "65b 1x2048 lora.r=64 memory.moments=paged memory.budget=48GiB",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=ROWS, type=Work.row)
    parser.add_argument("--steps", type=int, default=3, help="timed ones, after three of warm-up")
    parser.add_argument("--row-limit", type=float, default=120, help="seconds for a row")
    add_job_options(parser, output="memory_steps.json")
    options = parser.parse_args()
    jobs = [Job(row, measure, (row, options.steps), options.row_limit) for row in options.rows]
    write_rows(jobs, options, shown)


if __name__ == "__main__":
    main()
