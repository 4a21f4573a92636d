"""Do nybble and PEFT learn the same? SmolLM2 from one initial adapter, the same sequences in the same order.

python benchmarks/peft_parity.py --model FOLDER --output FILE [--steps 150]
Each arm is a process: PEFT and nybble three times each a method, all at once, since only losses count here. The mean
absolute difference of the losses, averaged over all pairs of a nybble and a PEFT run, is held against the one over all
pairs of PEFT runs, or 2e-3 where that is larger. Text: Python's own library.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from itertools import combinations, product
from pathlib import Path

import torch
from arms import add_sizes, distance, library_windows, run_arms
from results import send_row, write_result
from stacks import STACKS, Adapter, Row


def write_initial_adapter(model: str, folder: Path) -> None:
    from nybble.adapters.config import LoraConfig
    from nybble.adapters.inject import inject
    from nybble.adapters.io import save_adapter
    from nybble.models.config import ModelConfig
    from nybble.models.load import load_model

    loaded = load_model(ModelConfig(name=model), device=torch.device("cpu"))
    inject(loaded.model, LoraConfig(r=16, lora_alpha=32))
    save_adapter(loaded.model, folder, provenance=loaded.provenance)


def run_arm(options: argparse.Namespace) -> None:
    name, method, _ = options.arm.split("-")
    row = Row(method, "bf16", options.batch, options.seq_len, "keep")
    adapter = Adapter(learning_rate=options.learning_rate, folder=options.adapter)
    windows = library_windows(options.model, options.steps, options.batch, options.seq_len)
    torch.manual_seed(0)
    stack = STACKS[name](options.model, row, adapter, longest=options.seq_len)
    stack.prepare(row)
    records = list(stack.steps(row, windows))
    figures = {
        "arm": options.arm,
        "loss": [round(record.loss, 6) for record in records],
        "grad_norm": [round(record.grad_norm, 6) for record in records],
        "notes": stack.notes,
    }
    send_row(figures)


def differences(rows: dict[str, list[float]], method: str) -> dict[str, float]:
    ours = [losses for arm, losses in rows.items() if arm.startswith(f"nybble-{method}-")]
    peft = [losses for arm, losses in rows.items() if arm.startswith(f"peft-{method}-")]
    pairs = {
        "nybble_to_peft": list(product(ours, peft)),
        "peft_to_peft": list(combinations(peft, 2)),
        "nybble_to_nybble": list(combinations(ours, 2)),
    }
    return {name: statistics.mean(distance(*pair) for pair in found) for name, found in pairs.items() if found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, steps=150)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["lora", "qlora"])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/peft_parity.json"))
    parser.add_argument("--adapter", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        run_arm(options)
        return
    adapter = Path(tempfile.mkdtemp()) / "initial"
    write_initial_adapter(options.model, adapter)
    rows, summary = [], {}
    for method in options.methods:
        arms = [f"{stack}-{method}-{run}" for stack in ("peft", "nybble") for run in range(1, options.runs + 1)]
        rows += run_arms(arms, "--adapter", str(adapter))
        summary[method] = differences({row["arm"]: row["loss"] for row in rows}, method)
        print(method, summary[method], flush=True)
        settings = {name: getattr(options, name) for name in ("steps", "batch", "seq_len", "learning_rate", "runs")}
        write_result(options.output, rows, settings=settings, mean_absolute_difference=summary)


if __name__ == "__main__":
    main()
