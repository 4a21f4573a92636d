"""What merging an adapter into a 16-bit checkpoint takes of the host and the device, at their peaks.

python benchmarks/merge_memory.py --shapes 8b 70b-8layers --scratch FOLDER
Each finished file is hashed and deleted, so that the disk need hold one of the result's.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch
from host_peak import host_peak
from layer_checkpoint import write_adapter, write_checkpoint
from results import received_row, send_row, write_result

from nybble.adapters.saved import read_adapter
from nybble.export.merge_plan import Base
from nybble.export.merged import merge_checkpoint
from nybble.models.checkpoint import Checkpoint
from nybble.models.dtypes import resolve_device

_PART_BYTES = 2**23


def measure(folder: Path, adapter: Path, base: Base) -> dict[str, Any]:
    """Figures of one merge, in this process, which has done nothing before it."""
    device = resolve_device()
    digests: dict[str, str] = {}

    def take(file: Path) -> None:
        digests[file.name] = _digest(file)
        file.unlink()

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder.parent) as output, host_peak() as host:
        report = merge_checkpoint(
            Checkpoint.open(str(folder)),
            read_adapter(adapter),
            Path(output) / "merged",
            base=base,
            device=device,
            on_file=take,
        )
    figures = {
        "base": base,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "seconds": round(time.perf_counter() - started, 2),
        "output_bytes": report.output_bytes,
        "tensors_changed": report.tensors_changed,
        "host_peak_bytes": host.peak_bytes,
        "sha256": digests,
    }
    if device.type == "cuda":
        figures["device_peak_bytes"] = torch.cuda.max_memory_reserved()
    return figures


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(_PART_BYTES):
            digest.update(part)
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8b", "70b-8layers"])
    parser.add_argument("--bases", nargs="+", choices=("original", "dequantized"), default=["original", "dequantized"])
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--scratch", type=Path, help="keeps the checkpoints, for another time")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/merge_memory.json"))
    parser.add_argument("--measure", nargs=3, metavar=("FOLDER", "ADAPTER", "BASE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        folder, adapter, base = options.measure
        send_row(measure(Path(folder), Path(adapter), cast(Base, base)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = options.scratch or Path(temporary)
        for shape in options.shapes:
            adapter = scratch / f"{shape}-adapter-r{options.r}"
            write_checkpoint(shape, scratch / shape)
            write_adapter(shape, adapter, r=options.r)
            for base in options.bases:
                command = [sys.executable, __file__, "--measure", str(scratch / shape), str(adapter), base]
                done = subprocess.run(command, capture_output=True, text=True)
                row = {"shape": shape, "r": options.r} | (received_row(done.stdout) or {"error": done.stderr[-1500:]})
                rows.append(row)
                print({name: value for name, value in row.items() if name != "sha256"}, flush=True)
                write_result(options.output, rows)


if __name__ == "__main__":
    main()
