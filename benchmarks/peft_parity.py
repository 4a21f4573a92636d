"""Do nybble and PEFT learn the same? SmolLM2 from one initial adapter, the same sequences in the same order.

python benchmarks/peft_parity.py --model FOLDER --output FILE [--steps 150]
Each arm is a process: PEFT and nybble three times each a method, all at once, since only losses count here. The mean
absolute difference of the losses, averaged over all pairs of a nybble and a PEFT run, is held against the one over all
pairs of PEFT runs, or 2e-3 where that is larger. Text: Python's own library.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from itertools import combinations, product
from pathlib import Path
from subprocess import PIPE

import torch
from results import received_row, send_row, write_result
from stacks import STACKS, Work


def library_windows(model: str, steps: int, batch: int, seq_len: int) -> torch.Tensor:
    """Token ids (steps, batch, seq_len) from the standard library's source files, in the order of their names."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    needed, tokens = steps * batch * seq_len, []
    for file in _library_files():
        tokens += tokenizer(file.read_text(encoding="utf-8", errors="ignore")).input_ids
        if len(tokens) >= needed:
            return torch.tensor(tokens[:needed]).view(steps, batch, seq_len)
    raise SystemExit(f"the library has {len(tokens)} tokens in the files taken, {needed} are needed")


def _library_files() -> list[Path]:
    folder = Path(sysconfig.get_path("stdlib"))
    return [*sorted(folder.glob("*.py")), *sorted(folder.glob("asyncio/*.py")), *sorted(folder.glob("email/*.py"))]


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
    windows = library_windows(options.model, options.steps, options.batch, options.seq_len)
    stack, method = options.arm.split("-")[:2]
    work = Work(
        options.model,
        method,
        windows,
        learning_rate=options.learning_rate,
        checkpointing=False,
        adapter=options.adapter,
    )
    torch.manual_seed(0)
    records = list(STACKS[stack](work).steps)
    figures = {
        "arm": options.arm,
        "loss": [round(record.loss, 6) for record in records],
        "grad_norm": [round(record.grad_norm, 6) for record in records],
    }
    send_row(figures)


def differences(rows: dict[str, list[float]], method: str) -> dict[str, float]:
    def distance(one: str, other: str) -> float:
        pairs = zip(rows[one], rows[other], strict=True)
        return statistics.mean(abs(a - b) for a, b in pairs)

    ours = [arm for arm in rows if arm.startswith(f"nybble-{method}-")]
    peft = [arm for arm in rows if arm.startswith(f"peft-{method}-")]
    return {
        "nybble_to_peft": statistics.mean(distance(*pair) for pair in product(ours, peft)),
        "peft_to_peft": statistics.mean(distance(*pair) for pair in combinations(peft, 2)),
        "nybble_to_nybble": statistics.mean(distance(*pair) for pair in combinations(ours, 2)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["lora", "qlora"])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/peft_parity.json"))
    parser.add_argument("--adapter", help=argparse.SUPPRESS)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        run_arm(options)
        return
    adapter = Path(tempfile.mkdtemp()) / "initial"
    write_initial_adapter(options.model, adapter)
    rows, summary = [], {}
    for method in options.methods:
        arms = [f"{stack}-{method}-{run}" for stack in ("peft", "nybble") for run in range(1, options.runs + 1)]
        command = [sys.executable, *sys.argv, "--adapter", str(adapter), "--arm"]
        running = {arm: subprocess.Popen([*command, arm], stdout=PIPE, stderr=PIPE, text=True) for arm in arms}
        for arm, process in running.items():
            output, errors = process.communicate()
            figures = received_row(output)
            if figures is None:
                raise SystemExit(f"{arm} failed\n{errors[-3000:]}")
            rows.append(figures)
            print(arm, figures["loss"][0], figures["loss"][-1], flush=True)
        summary[method] = differences({row["arm"]: row["loss"] for row in rows}, method)
        print(method, summary[method], flush=True)
        settings = {name: getattr(options, name) for name in ("steps", "batch", "seq_len", "learning_rate", "runs")}
        write_result(options.output, rows, settings=settings, mean_absolute_difference=summary)


if __name__ == "__main__":
    main()
