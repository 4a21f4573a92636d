"""Run every benchmark on this machine's GPU and bring the README's tables up to date: python benchmarks/run.py

About 15 minutes and 20 GB of disk on an H100. Each part is a script of its own and can be run alone.
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


def run(script: str, *arguments: object) -> None:
    print(f"\n== {script}", flush=True)
    subprocess.run([sys.executable, str(HERE / script), *map(str, arguments)], check=True)


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("the benchmarks need an NVIDIA GPU")
    smollm2 = demo_model(cache_folder(), say=print)
    with tempfile.TemporaryDirectory() as scratch:
        model_8b = Path(scratch) / "8b"
        run("make_model.py", "8b", model_8b)
        run("nf4.py", "--output", RESULTS / "nf4.json")
        run("train_step.py", "--model", model_8b, "--output", RESULTS / "step_8b.json")
    short = ("qlora 16 512 kept", "lora 16 512 kept")
    run("train_step.py", "--model", smollm2, "--rows", *short, "--steps", 20, "--output", RESULTS / "step_smollm2.json")
    run("peft_parity.py", "--model", smollm2, "--output", RESULTS / "peft_parity.json")
    run("report.py")


if __name__ == "__main__":
    main()
