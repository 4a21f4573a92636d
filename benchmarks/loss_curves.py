"""Do fused kernels, CUDA graphs and fp8 change what is learned? SmolLM2 on the text of Python's own library, QLoRA.

python benchmarks/loss_curves.py --model FOLDER --output FILE [--steps 200]
Losses: stock modules twice and fused kernels in a graph twice, from one adapter on the same sequences in the same
order; the mean absolute difference between the two kinds is held against those within each. Held-out loss, on files
that are never trained on and by the stock modules in bf16: bf16 and fp8, each from three seeds.
"""

from __future__ import annotations

import argparse
import statistics
from itertools import product
from pathlib import Path
from typing import Any

import torch
from arms import add_sizes, distance, held_out_windows, library_windows, run_arms
from results import send_row, write_result
from stacks import Adapter, Nybble, Row, batches

SEEDS = (0, 1, 2)
STOCK = ("stock-0-1", "stock-0-2")
FUSED = ("fused-0-1", "fused-0-2")
HELD_OUT_BATCHES = 16


def arms() -> list[str]:
    """KIND-SEED-RUN."""
    by_seed = [f"{kind}-{seed}-1" for kind in ("fused", "fp8") for seed in SEEDS]
    return list(dict.fromkeys([*STOCK, *FUSED, *by_seed]))


def run_arm(options: argparse.Namespace) -> None:
    from nybble.models.loss import CausalLMLoss
    from nybble.train.evaluate import evaluate

    kind, seed, _ = options.arm.split("-")
    row = Row(options.method, "fp8" if kind == "fp8" else "bf16", options.batch, options.seq_len, "keep")
    train = {"train.seed": int(seed), "train.fused": kind != "stock"}
    adapter = Adapter(learning_rate=options.learning_rate)
    stack = Nybble(options.model, row, adapter, longest=options.seq_len, train=train)
    stack.prepare(row)
    windows = library_windows(options.model, options.steps, options.batch, options.seq_len)
    if int(seed):
        windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(int(seed)))]
    held_out = held_out_windows(options.model, HELD_OUT_BATCHES, options.batch, options.seq_len)
    stock = CausalLMLoss(stack.loaded.model)
    before = evaluate(stock, batches(held_out)).loss
    records = list(stack.steps(row, windows))
    send_row(
        {
            "arm": options.arm,
            "loss": [round(record.loss, 6) for record in records],
            "grad_norm": [round(record.grad_norm, 6) for record in records],
            "held_out": [before, evaluate(stock, batches(held_out)).loss],
            "notes": stack.notes,
        }
    )


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What there is to say about the arms that came through."""
    losses = {row["arm"]: row["loss"] for row in rows}
    held_out = {row["arm"]: row["held_out"][1] for row in rows}
    kinds = {
        "stock_to_stock": [STOCK],
        "fused_to_fused": [FUSED],
        "fused_to_stock": list(product(STOCK, FUSED)),
        "fp8_to_fused": [("fp8-0-1", fused) for fused in FUSED],
    }
    found: dict[str, float] = {}
    for name, pairs in kinds.items():
        if all(arm in losses for pair in pairs for arm in pair):
            found[name] = statistics.mean(distance(losses[one], losses[other]) for one, other in pairs)
    seeds = [seed for seed in SEEDS if f"fused-{seed}-1" in held_out and f"fp8-{seed}-1" in held_out]
    if seeds:
        for kind in ("fused", "fp8"):
            found[f"held_out_{kind}"] = statistics.mean(held_out[f"{kind}-{seed}-1"] for seed in seeds)
        found["held_out_fp8_worse_by"] = found["held_out_fp8"] - found["held_out_fused"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, steps=200)
    parser.add_argument("--method", default="qlora", choices=["qlora", "lora"])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/loss_curves.json"))
    options = parser.parse_args()
    if options.arm:
        run_arm(options)
        return
    rows = []
    settings = {name: getattr(options, name) for name in ("method", "steps", "batch", "seq_len", "learning_rate")}
    for row in run_arms(arms()):
        rows.append(row)
        write_result(options.output, rows, settings=settings, summary=summary(rows))
    for name, value in summary(rows).items():
        print(f"{name:24}{value:.5f}")


if __name__ == "__main__":
    main()
