"""Run the benchmarks on this machine's GPU and bring the tables up to date: python benchmarks/run.py

One to two hours and 60 GB of disk on an H100 with all peers installed. Each part is a script of its own and can be run
alone; one that fails does not end the others. Left out is rounding.py, which needs texts to calibrate and to hold out.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from nybble.demo.model import demo_model
from nybble.files import cache_folder

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SMALL = ("qlora bf16 16 512 keep", "lora bf16 16 512 keep")  # rows of SmolLM2


def run(script: str, *arguments: object) -> bool:
    """Whether it went well."""
    print(f"\n== {' '.join(map(str, [script, *arguments]))}", flush=True)
    return subprocess.run([sys.executable, str(HERE / script), *map(str, arguments)]).returncode == 0


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("the benchmarks need an NVIDIA GPU")
    smollm2 = demo_model(cache_folder(), say=print)
    with tempfile.TemporaryDirectory() as scratch:
        model_8b, two_layers = Path(scratch) / "8b", Path(scratch) / "8b-2layers"
        parts: list[tuple[object, ...]] = [
            ("make_model.py", "8b-2layers", two_layers),
            ("make_model.py", "8b", model_8b),
            ("check_step.py", "--model", two_layers, "--methods", "qlora", "lora"),
            ("train_step.py", "--model", model_8b, "--share-load", "--output", RESULTS / "step_8b.json"),
            *(("profile_step.py", "--model", model_8b, "--row", f"qlora {p} 4 2048 keep") for p in ("bf16", "fp8")),
            ("packed_chat.py", "--model", model_8b),
            ("load.py", "--model", model_8b),
            ("load_memory.py", "--scratch", scratch),
            ("merge_memory.py", "--scratch", scratch),
            *((f"{name}.py",) for name in ("memory", "plan_check", "long_context", "paging", "host_growth")),
            ("nf4.py", "--output", RESULTS / "nf4.json"),
            ("kernels.py", "--output", RESULTS / "kernels.json"),
            ("train_step.py", "--model", smollm2, "--rows", *SMALL, "--output", RESULTS / "step_smollm2.json"),
            ("loss_curves.py", "--model", smollm2),
            ("peft_parity.py", "--model", smollm2),
            ("report.py",),
        ]
        failed = [part for part in parts if not run(*map(str, part))]
    if failed:
        raise SystemExit("failed: " + ", ".join(str(part[0]) for part in failed))


if __name__ == "__main__":
    main()
