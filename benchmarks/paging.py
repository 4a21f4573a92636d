"""Paged optimizer state: a run with a spike of memory that fails without it and finishes with it, and what it costs.

python benchmarks/paging.py [--model 8b] [--rank 128] [--short 512] [--long 16384] [--gpus 0 1] [--time-limit SECONDS]
Short sequences with a long one among them. The budget of the runs within it is what the long step needs with the state
on the card and without a CUDA graph beside it, less half of the state. All offload activations already, so there is no
leaner way to make them. Where every sequence is long, the state has to move in every step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from jobs import Figures, Job, add_job_options, write_rows
from results import write_result
from work import Run, Work, figures_of, gib, timed_steps

from nybble.memory.budget import peak

SAME = "memory.activations=offload memory.weights=resident memory.embedding=device memory.head=device"
BEFORE, AFTER = 40, 40  # short steps around the long one: after fewer, graphs are not made again at once
ALWAYS_LONG = 6  # steps


def spiked(text: str, lengths: Sequence[int]) -> Figures:
    """Figures of steps of one sequence each, as long as `lengths` say; the peak is also told before the longest."""
    from stacks import batches

    run = Run(Work.parse(text))
    torch.manual_seed(0)
    windows = [torch.randint(10, 250, (1, 1, length)) for length in lengths]
    results, seconds, before_longest = [], [], 0
    micro_batches = (batch for window in windows for batch in batches(window))
    for result, step_s in timed_steps(run, micro_batches, total=len(lengths)):
        results.append(result)
        seconds.append(step_s)
        if lengths[len(results) : len(results) + 1] == [max(lengths)] and not before_longest:
            before_longest = peak(run.device).total_bytes
    moments = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad) * 8
    return figures_of(run, results, seconds) | {
        "lengths": list(lengths),
        "peak_before_gib": gib(before_longest),
        "moments_gib": gib(moments),
        "short_step_s": _median(seconds, lengths, min(lengths)),
        "long_step_s": _median(seconds, lengths, max(lengths)),
    }


def _median(seconds: Sequence[float], lengths: Sequence[int], length: int) -> float:
    """Of the steps of this length; without the first three if there are more."""
    of_length = [s for s, found in zip(seconds, lengths, strict=True) if found == length]
    return round(statistics.median(of_length[3:] or of_length), 4)


def budget_of(graphs: Figures, no_graphs: Figures) -> float:
    """GiB in which the short steps have room with graphs and all, and the long one not even without graphs."""
    budget = no_graphs["peak_gib"] - no_graphs["moments_gib"] / 2
    if budget < graphs["peak_before_gib"]:
        needed = graphs["peak_before_gib"]
        raise SystemExit(f"short steps need {needed:.2f} GiB, more than {budget:.2f} GiB: make the long one longer")
    return round(budget, 3)


def compared(free: Figures, paged: Figures) -> dict[str, Any]:
    """How far the paged run's losses are from the unlimited one's, and how much longer its steps take."""
    pairs = zip(free["loss"], paged["loss"], strict=True)
    return {
        "largest_loss_difference": max(abs(one - other) for one, other in pairs),
        "short_step_ratio": round(paged["short_step_s"] / free["short_step_s"], 4),
        "long_step_ratio": round(paged["long_step_s"] / free["long_step_s"], 4),
    }


def shown(figures: Figures) -> str:
    text = (
        "{row}: short step {short_step_s} s, long {long_step_s} s  peak {peak_before_gib:.2f}, then {peak_gib:.2f} GiB"
        "  loss {first:.4f} -> {last:.4f}  {process_s} s  "
    )
    text = text.format(**figures, first=figures["loss"][0], last=figures["loss"][-1])
    return text + "; ".join(figures["notes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="8b")
    parser.add_argument("--rank", type=int, default=128, help="128 for 8B: moments of 2.5 GiB")
    parser.add_argument("--short", type=int, default=512)
    parser.add_argument("--long", type=int, default=16384)
    parser.add_argument("--row-limit", type=float, default=90, help="seconds for a row")
    add_job_options(parser, output="memory_paging.json")
    options = parser.parse_args()
    spike = [options.short] * BEFORE + [options.long] + [options.short] * AFTER
    always = [options.long] * ALWAYS_LONG

    def job(name: str, lengths: Sequence[int], moments: str, *more: str) -> Job:
        settings = [SAME, f"lora.r={options.rank}", f"memory.moments={moments}", *more]
        row = " ".join([options.model, f"1x{options.short}", *settings])
        return Job(name, spiked, (row, lengths), options.row_limit)

    first = [
        job("one long, resident", spike, "resident"),
        job("one long, resident, no graphs", spike, "resident", "train.cuda_graph=false"),
        job("all long, resident", always, "resident"),
    ]
    began = time.monotonic()
    found = {row["row"]: row for row in write_rows(first, options, shown)}
    options.time_limit -= time.monotonic() - began
    if any("error" in found[needed.name] for needed in first[:2]):
        raise SystemExit("without the first two rows there is no budget for the others")
    budget = f"memory.budget={budget_of(found[first[0].name], found[first[1].name])}GiB"
    second = [
        job("one long, paged, within the budget", spike, "paged", budget),
        job("one long, resident, within the budget: fails", spike, "resident", budget),
        job("all long, paged, within the budget", always, "paged", budget),
    ]
    found |= {row["row"]: row for row in write_rows(second, options, shown, earlier=list(found.values()))}
    comparisons = {
        name: compared(found[f"{name}, resident"], found[f"{name}, paged, within the budget"])
        for name in ("one long", "all long")
        if not any("error" in found[row] for row in (f"{name}, resident", f"{name}, paged, within the budget"))
    }
    print(comparisons)
    card = found[first[0].name]["device"]
    write_result(options.output, list(found.values()), card, budget=budget, paged_to_resident=comparisons)


if __name__ == "__main__":
    main()
