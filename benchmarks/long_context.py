"""The longest contexts: one complete optimizer step of one sequence within the memory of a card.

python benchmarks/long_context.py [--rows "8b 1x100000 memory.budget=23.5GiB" ...] [--gpus 0 1] [--time-limit SECONDS]
Rows are as in memory.py; budgets are what drivers show of cards of 80, 48, 24 and 8 GB. With 350,000 tokens most of a
step is attention: some minutes. Nothing is warmed up: the time of a step counts the compilation of kernels and the
locking of host memory.
"""

from __future__ import annotations

import argparse

from jobs import Job, add_job_options, write_rows
from work import GIB, HOST_BYTES, Work, measure, shown

ROWS = [
    "8b 1x350000 lora.r=32 memory.budget=79GiB",
    "70b 1x100000 lora.r=32 memory.budget=79GiB",
    "8b 1x100000 lora.r=32 memory.budget=23.5GiB",
    "70b 1x20000 lora.r=32 memory.budget=47.4GiB",
    "8b 1x20000 lora.r=32 memory.budget=7.6GiB",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=ROWS, type=Work.row)
    parser.add_argument("--row-limit", type=float, default=1200, help="seconds for a row")
    parser.add_argument("--host-gib", type=int, default=HOST_BYTES // GIB, help="of host memory that a plan may lock")
    add_job_options(parser, output="memory_long_context.json")
    options = parser.parse_args()
    arguments = (1, 0, options.host_gib * GIB)
    jobs = [Job(row, measure, (row, *arguments), options.row_limit) for row in options.rows]
    write_rows(jobs, options, shown)


if __name__ == "__main__":
    main()
