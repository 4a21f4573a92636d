"""Speed of every fused kernel, beside a plain copy of as many bytes.

    PYTHONPATH=src python3 benchmarks/kernels.py --output benchmarks/results/kernels.json

A time is the device's alone: the median of replays of a CUDA graph of one call, with the L2 cache emptied before each.
GB/s counts every byte that must be read or written once; a copy of n bytes reads n / 2 and writes n / 2. Where rows are
read from host memory, what counts is what is read there, beside a copy of as much to the device.
What is measured is listed in `benchmarks/kernel_cases/`, a file an op family.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernel_cases import KernelBenchmark, all_cases
from results import origin, write_result
from torch import Tensor
from triton.testing import do_bench

from nybble.memory.pinned import pinned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the results here as JSON")
    parser.add_argument("--only", default="", help="measure the cases whose name has this in it")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("the benchmark needs an NVIDIA GPU")
    print(origin()["device"])
    print(f"{'kernel':<32}{'shape':<24}{'MB':>9}{'us':>10}{'GB/s':>9}{'of a copy':>11}{'TFLOP/s':>9}")
    rows = []
    for case in all_cases():
        if options.only in case.name:
            rows.append(measure(case, torch.device("cuda")))
            print_row(rows[-1])
    if options.output:
        write_result(options.output, rows)


def measure(case: KernelBenchmark, device: torch.device) -> dict[str, Any]:
    arguments = case.arguments(device)
    num_bytes = moved_bytes(case, arguments)
    device_s = median_device_s(functools.partial(case.op, *arguments, **case.options))
    return {
        "kernel": case.name,
        "shape": case.shape,
        "bytes": num_bytes,
        "device_us": device_s * 1e6,
        "gb_per_s": num_bytes / device_s / 1e9,
        "share_of_copy": (copy_from_host_s if case.from_host else copy_s)(num_bytes) / device_s,
        "tflop_per_s": case.flops / device_s / 1e12,
    }


def moved_bytes(case: KernelBenchmark, arguments: tuple[Any, ...]) -> int:
    if case.num_bytes is not None:
        return case.num_bytes
    results = case.op(*arguments, **case.options)
    results = results if isinstance(results, tuple) else (results,)
    moved = [*arguments, *case.options.values(), *results, *(arguments[i] for i in case.mutated)]
    return sum(tensor.nbytes for tensor in moved if isinstance(tensor, Tensor))


@functools.cache
def copy_s(num_bytes: int) -> float:
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device="cuda")
    return median_device_s(functools.partial(torch.empty_like(source).copy_, source))


@functools.cache
def copy_from_host_s(num_bytes: int) -> float:
    source, target = pinned(num_bytes), torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    return median_device_s(functools.partial(target.copy_, source, non_blocking=True))


def median_device_s(call: Callable[[], Any]) -> float:
    call()  # compiles the kernels, which a capture does not allow
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    milliseconds: float = do_bench(graph.replay, return_mode="median")
    return milliseconds / 1e3


def print_row(row: dict[str, Any]) -> None:
    speed = f"{row['bytes'] / 1e6:>9.1f}{row['device_us']:>10.1f}{row['gb_per_s']:>9.0f}{row['share_of_copy']:>11.1%}"
    flops = f"{row['tflop_per_s']:>9.0f}" if row["tflop_per_s"] else ""
    print(f"{row['kernel']:<32}{row['shape']:<24}{speed}{flops}", flush=True)


if __name__ == "__main__":
    main()
