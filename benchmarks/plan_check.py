"""Whether memory is as predicted: 30 settings of model, batch, method and policy, each measured beside its prediction.

python benchmarks/plan_check.py [--open] [--drawn] [--gpus 0 1] [--time-limit SECONDS]
Ten settings are open: the cost model was made with them at hand. Twenty are drawn by a fixed seed, and no constant is
fitted to them. Running out of memory is a failure.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable

from jobs import Figures, Job, add_job_options, write_rows
from work import HOST_BYTES, Work, measure

from nybble.errors import UserError
from nybble.planner.cards import DeviceSpec, card

OPEN = [
    "1b 8x2048 memory.activations=keep",
    "1b 4x2048 method=lora memory.activations=recompute",
    "8b 4x2048 memory.activations=keep",
    "8b 1x2048 memory.activations=recompute",
    "8b 4x2048 memory.activations=offload",
    "8b 4x2048 memory.budget=12GiB",
    "8b 1x2048 memory.weights=streamed memory.activations=recompute",
    "8b 2x2048 method=lora memory.activations=keep",
    "8b 1x2048 optim.state_bits=8 memory.embedding=host memory.head=host memory.budget=5GiB",
    "8b 4x2048 train.precision=fp8 memory.activations=keep",
]
SEED, DRAWN = 31, 20
CLOSE_SHARE, CLOSE_GIB = 0.05, 150 / 1024  # whichever is larger
BELOW_SHARE = 0.02

# A model, how often it is drawn, and the most tokens a micro-batch: 8,192 of 13b with all kept fill 60 GiB.
MODELS = {"1b": (2, 16384), "3b": (2, 16384), "qwen3-4b": (2, 8192), "8b": (4, 8192), "13b": (1, 8192)}
# Values and how often they are drawn; the first is the setting's default.
CHOICES = {
    "method": (["qlora", "lora"], [3, 1]),
    "lora.r": ([16, 8, 64], [2, 1, 1]),
    "optim.state_bits": ([32, 8], [2, 1]),
    "train.gradient_accumulation": ([1, 2], [3, 1]),
    "train.precision": (["bf16", "fp8"], [5, 1]),
    "memory.activations": (
        ["auto", "keep", "keep_matmuls", "keep_on_host", "recompute", "offload"],
        [3, 2, 1, 1, 2, 2],
    ),
    "memory.weights": (["auto", "resident", "streamed"], [2, 2, 1]),
    "memory.embedding": (["auto", "device", "host"], [2, 1, 1]),
    "memory.head": (["auto", "device", "host"], [2, 1, 1]),
    "memory.moments": (["auto", "paged"], [3, 1]),
    "memory.span": ([0, 1, 2], [2, 1, 1]),
}
BUDGETS = (["79GiB", "24GiB", "12GiB", "8GiB"], [2, 1, 1, 1])


def drawn(count: int = DRAWN, seed: int = SEED) -> list[str]:
    """Settings that can be carried out and by the planner's word fit their budget; others are drawn anew."""
    chance, device, rows = random.Random(seed), card("h100").with_host(HOST_BYTES), list[str]()
    while len(rows) < count:
        row = _draw(chance)
        if row not in rows and _fits(row, device):
            rows.append(row)
    return rows


def _fits(row: str, device: DeviceSpec) -> bool:
    try:
        planned = Work.parse(row).plan(device)
    except UserError:  # settings that exclude each other
        return False
    return planned.solution is not None and planned.solution.fits


def _draw(chance: random.Random) -> str:
    model = chance.choices(list(MODELS), [often for often, _ in MODELS.values()])[0]
    seq_len = chance.choice([512, 1024, 2048, 4096])
    batch = chance.choice([size for size in (1, 2, 4, 8) if size * seq_len <= MODELS[model][1]])
    settings = {name: chance.choices(*choices)[0] for name, choices in CHOICES.items()}
    changed = [f"{name}={value}" for name, value in settings.items() if value != CHOICES[name][0][0]]
    budget = chance.choices(*BUDGETS)[0]
    return " ".join([model, f"{batch}x{seq_len}", *changed, f"memory.budget={budget}"])


def verdict(predicted_gib: float, measured_gib: float) -> str:
    """`ok`, or in which way the prediction is off."""
    if predicted_gib < measured_gib * (1 - BELOW_SHARE):
        return "TOO LOW"
    close = abs(predicted_gib - measured_gib) <= max(CLOSE_SHARE * measured_gib, CLOSE_GIB)
    return "ok" if close else "OFF"


def checked(row: str) -> Figures:
    """A step or two of each kind, and how far its peak is from what was predicted."""
    figures = measure(row, 1, 3)
    off = figures["predicted_gib"] / figures["peak_gib"] - 1 if figures["peak_gib"] else 0.0
    return figures | {"off": round(off, 4), "verdict": verdict(figures["predicted_gib"], figures["peak_gib"])}


def shown(figures: Figures) -> str:
    text = (
        "{verdict:8}{off:+7.1%}  predicted {predicted_gib:6.2f}  peak {peak_gib:6.2f} GiB  (reserved "
        "{predicted_reserved_gib:.2f} / {peak_reserved_gib:.2f}, allocated {predicted_allocated_gib:.2f} / "
        "{peak_allocated_gib:.2f}, beyond {beyond_gib:.2f})  {tokens_per_second:,.0f} tok/s (predicted "
        "{predicted_tokens_per_second:,.0f})  {process_s} s  {row}  [{plan}]"
    )
    return text.format(**figures)


def summary(rows: Iterable[Figures]) -> str:
    rows = list(rows)
    good = sum(row.get("verdict") == "ok" for row in rows)
    worst = max((abs(row["off"]) for row in rows if "off" in row), default=0.0)
    return f"{good} of {len(rows)} within 5 % or 150 MiB, never below by more than 2 %; farthest {worst:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--open", action="store_true", help="the open settings alone")
    parser.add_argument("--drawn", action="store_true", help="the drawn ones alone")
    parser.add_argument("--rows", nargs="+", type=Work.row, help="these instead")
    parser.add_argument("--row-limit", type=float, default=60, help="seconds for a row")
    add_job_options(parser, output="memory_plan_check.json")
    options = parser.parse_args()
    rows = options.rows or [*([] if options.drawn else OPEN), *([] if options.open else drawn())]
    jobs = [Job(row, checked, (row,), options.row_limit) for row in rows]
    print(summary(write_rows(jobs, options, shown, seed=SEED)))


if __name__ == "__main__":
    main()
