"""Whether host memory grows: a thousand steps with weights streamed, activations offloaded and moments paged.

python benchmarks/host_growth.py [--row "1b 1x512 ..."] [--steps 1000] [--gpus 0] [--time-limit SECONDS]
"""

from __future__ import annotations

import argparse

import torch
from host_peak import held_bytes
from jobs import Figures, Job, add_job_options, write_rows
from work import Run, Work, figures_of, gib, timed_steps

ROW = (
    "1b 1x512 optim.state_bits=8 memory.activations=offload memory.weights=streamed memory.embedding=host "
    "memory.head=host memory.moments=paged"
)
SAMPLES = 20
SETTLED = 0.1  # of the steps; until then kernels are compiled and pools made


def growth(text: str, total: int) -> Figures:
    """Host memory over `total` steps, and what it gained after the first tenth of them."""
    from stacks import batches

    work = Work.parse(text)
    run = Run(work)
    chance = torch.Generator().manual_seed(0)
    micro_batches = (
        batch
        for _ in range(total)
        for batch in batches(torch.randint(10, 250, (1, work.batch, work.seq_len), generator=chance))
    )
    results, seconds, samples = [], [], []
    for result, step_s in timed_steps(run, micro_batches, total=total):
        seconds.append(step_s)
        results = [*results[:1], result]
        if result.step % max(1, total // SAMPLES) == 0:
            samples.append((result.step, held_bytes()))
    settled = [held for step, held in samples if step >= SETTLED * total]
    return figures_of(run, results, seconds[-10:]) | {
        "steps": total,
        "host_gib": [(step, gib(held)) for step, held in samples],
        "growth_mib": round((settled[-1] - settled[0]) / 2**20, 1),
    }


def shown(figures: Figures) -> str:
    held = figures["host_gib"]
    text = "{row}: {steps} steps, host memory grew by {growth_mib} MiB".format(**figures)
    return f"{text} ({held[0][1]:.3f} GiB at step {held[0][0]}, {held[-1][1]:.3f} GiB at step {held[-1][0]})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", default=ROW, type=Work.row)
    parser.add_argument("--steps", type=int, default=1000)
    add_job_options(parser, output="memory_host_growth.json")
    options = parser.parse_args()
    write_rows([Job(options.row, growth, (options.row, options.steps), options.time_limit)], options, shown)


if __name__ == "__main__":
    main()
