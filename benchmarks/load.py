"""From the command to the first step: `nybble train` for one step, on a 16-bit folder and on an NF4 folder.

python benchmarks/load.py --model FOLDER --output FILE
Each twice: at the first run kernels are compiled and the data is tokenized, the second finds both in caches. The
weights are in the page cache if they fit. What a run says on its way is kept with the seconds at which it said it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from arms import training_files
from results import write_result


def write_text_data(file: Path, rows: int, characters: int) -> None:
    text = "".join(source.read_text(encoding="utf-8", errors="ignore") for source in training_files())
    parts = (text[start : start + characters] for start in range(0, rows * characters, characters))
    file.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts), encoding="utf-8")


def train_once(model: Path, scratch: Path, output: Path, options: argparse.Namespace) -> dict[str, Any]:
    settings = {"train.max_steps": 1, "train.batch_size": options.batch, "data.max_length": options.seq_len}
    settings |= {"memory.activations": "keep", "data.packing": "true"}
    command = [sys.executable, "-m", "nybble", "train", "--model", str(model), "--data", str(scratch / "text.jsonl")]
    command += ["--method", "qlora", "--output", str(output)]
    command += [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    caches = {"TRITON_CACHE_DIR": str(scratch / "triton"), "XDG_CACHE_HOME": str(scratch / "cache")}
    started, said = time.perf_counter(), []
    with subprocess.Popen(
        command, env=os.environ | caches, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append((round(time.perf_counter() - started, 2), line.rstrip()))
    first_step = next((seconds for seconds, line in said if line.startswith("step 1/")), None)
    if first_step is None:
        return {"failed": "\n".join(line for _, line in said)[-1500:]}
    loaded = json.loads((output / "run.json").read_text())["base"]["load_seconds"]
    return {
        "first_step_seconds": first_step,
        "load_seconds": loaded,
        "total_seconds": round(time.perf_counter() - started, 2),
        "said": said,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--nf4", type=Path, help="an NF4 folder of the model, if there is one already")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/load.json"))
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        write_text_data(scratch / "text.jsonl", rows=64, characters=options.seq_len // 2)  # a byte may be a token
        nf4 = options.nf4 or scratch / "nf4"
        for kind, model in (("16 bit", options.model), ("NF4", nf4)):
            if not model.exists():
                command = [
                    sys.executable,
                    "-m",
                    "nybble",
                    "quantize",
                    "--model",
                    str(options.model),
                    "--output",
                    str(nf4),
                ]
                subprocess.run(command, check=True)
            for run in ("first", "second"):
                figures = train_once(model, scratch, scratch / f"{model.name}-{run}", options)
                rows.append({"weights": kind, "run": run} | figures)
                shown = {name: value for name, value in figures.items() if name != "said"}
                print(f"{kind:8}{run:8}", figures.get("failed") or shown, flush=True)
                write_result(options.output, rows)


if __name__ == "__main__":
    main()
