"""What quantizing a 16-bit checkpoint while loading takes beyond the model: host and device, at their peaks.

python benchmarks/load_memory.py --shapes 8b 70b-8layers --scratch FOLDER
A shape like 70b-8layers is 70B with so many layers: a layer more changes the result, not what loading takes beside it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from host_peak import held_bytes, host_peak
from layer_checkpoint import write_checkpoint
from results import received_row, send_row, write_result

from nybble.models.config import ModelConfig
from nybble.models.dtypes import resolve_device
from nybble.models.load import load_model


def measure(folder: Path, storage: str) -> dict[str, Any]:
    """Figures of one load, in this process, which has done nothing before it."""
    device = resolve_device()
    started, at_start = time.perf_counter(), held_bytes()
    with host_peak() as host:
        loaded = load_model(ModelConfig(name=str(folder)), device=device, storage=storage)
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    figures = {
        "storage": storage,
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "seconds": round(seconds, 2),
        "result_bytes": loaded.weight_bytes,
        "host_peak_beyond_bytes": host.peak_bytes - (0 if on_gpu else loaded.weight_bytes),
        "host_left_bytes": held_bytes() - at_start,
    }
    if on_gpu:
        figures["device_peak_beyond_bytes"] = torch.cuda.max_memory_reserved() - loaded.weight_bytes
        figures["device_allocated_beyond_bytes"] = torch.cuda.max_memory_allocated() - loaded.weight_bytes
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8b", "70b-8layers"])
    parser.add_argument("--storage", nargs="+", default=["nf4"])
    parser.add_argument("--scratch", type=Path, help="keeps the checkpoints, for another time")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/load_memory.json"))
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "STORAGE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        send_row(measure(Path(options.measure[0]), options.measure[1]))
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = options.scratch or Path(temporary)
        for shape in options.shapes:
            write_checkpoint(shape, scratch / shape)
            for storage in options.storage:
                command = [sys.executable, __file__, "--measure", str(scratch / shape), storage]
                done = subprocess.run(command, capture_output=True, text=True)
                row = {"shape": shape} | (received_row(done.stdout) or {"error": done.stderr[-1500:]})
                rows.append(row)
                print(row, flush=True)
                write_result(options.output, rows)


if __name__ == "__main__":
    main()
