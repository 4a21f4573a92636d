"""Speed and error of NF4 quantization, beside bitsandbytes and a plain copy.

    PYTHONPATH=src python3 benchmarks/nf4.py --output benchmarks/results/nf4.json

GB/s counts every byte that must be read or written once. On a GPU two times are taken: of the device alone (calls
replayed from a CUDA graph) and of a call as a program makes it. Inputs and outputs rotate, so that none is left in the
L2 cache.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results import origin, write_result
from torch import Tensor

from nybble.ops.nf4 import absmax_quantize, nf4_quantize
from nybble.quant.format import NF4Spec
from nybble.quant.weight import NF4Weight

SHAPES = ((14336, 4096), (4096, 4096), (1024, 4096))
REPEATS = 50

Call = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the results here as JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", type=parse_shape, action="append", help="rows x columns, like 4096x4096; repeatable")
    options = parser.parse_args()
    device = torch.device(options.device)
    rows = [row for shape in options.shape or SHAPES for row in measure_shape(shape, device)]
    errors = measure_error(device)
    print_speed(rows)
    print_error(errors)
    if options.output:
        write_result(options.output, rows, error=errors)


def parse_shape(text: str) -> tuple[int, int]:
    rows, columns = text.split("x")
    return int(rows), int(columns)


def measure_shape(shape: tuple[int, int], device: torch.device) -> list[dict[str, Any]]:
    """One row for each operation and implementation."""
    copies = rotation(shape, device)
    weights = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(copies)]
    spec = NF4Spec()
    quantized = [NF4Weight.quantize(weight, spec) for weight in weights]
    dense, packed = weights[0].nbytes, quantized[0].nbytes
    tasks: list[tuple[str, str, int, list[Call]]] = [
        ("copy", "torch", 2 * dense, [weight.clone for weight in weights]),
        ("quantize", "nybble", dense + packed, [lambda w=w: quantize(w, spec) for w in weights]),
        ("dequantize", "nybble", dense + packed, [lambda q=q: q.dequantize(torch.bfloat16) for q in quantized]),
        *bitsandbytes_tasks(weights, dense + packed),
    ]
    return [
        {"shape": list(shape), "operation": operation, "by": by, **timings(calls, num_bytes, device)}
        for operation, by, num_bytes, calls in tasks
    ]


def quantize(weight: Tensor, spec: NF4Spec) -> tuple[Tensor, ...]:
    """As `NF4Weight.quantize`, without its look at the values, for which the host waits."""
    codes, absmax = nf4_quantize(weight, spec.block_size)
    return codes, *absmax_quantize(absmax, spec.group_size)


def bitsandbytes_tasks(weights: list[Tensor], num_bytes: int) -> list[tuple[str, str, int, list[Call]]]:
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        return []
    quantize = [lambda w=w: bnb.quantize_4bit(w, compress_statistics=True, quant_type="nf4") for w in weights]
    quantized = [call() for call in quantize]
    dequantize = [lambda q=q: bnb.dequantize_4bit(*q) for q in quantized]
    return [("quantize", "bitsandbytes", num_bytes, quantize), ("dequantize", "bitsandbytes", num_bytes, dequantize)]


def rotation(shape: tuple[int, int], device: torch.device) -> int:
    """How many weights to go through, so that four times the L2 cache lies between two uses of one."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-4 * cache // (shape[0] * shape[1] // 2)))


def timings(calls: list[Call], num_bytes: int, device: torch.device) -> dict[str, float | None]:
    """Median microseconds of one call, and GB/s by the device's own time where that is known."""
    call_s = median_call_s(calls, device)
    device_s = median_device_s(calls) if device.type == "cuda" else None
    best = call_s if device_s is None else device_s
    return {"gb_per_s": num_bytes / best / 1e9, "call_us": call_s * 1e6, "device_us": device_s and device_s * 1e6}


def median_call_s(calls: list[Call], device: torch.device) -> float:
    """A call from Python, its launches included: rounds through all inputs, with the device awaited at the end."""
    rounds = []
    for _ in range(REPEATS // 5):
        kept: collections.deque[Any] = collections.deque(maxlen=4)
        synchronize(device)
        start = time.perf_counter()
        for call in calls:
            kept.append(call())
        synchronize(device)
        rounds.append((time.perf_counter() - start) / len(calls))
    return statistics.median(rounds)


def median_device_s(calls: list[Call]) -> float | None:
    """The device's time for a call, from a CUDA graph of all; None for what waits for the host."""
    graph, kept = torch.cuda.CUDAGraph(), []
    try:
        with torch.cuda.graph(graph):
            kept = [call() for call in calls]
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    graph.replay()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(kept))
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_error(device: torch.device) -> list[dict[str, Any]]:
    """Relative error of NF4 on standard normal weights, and the bits a weight it takes."""
    weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).to(device)
    rows = []
    for block_size, group_size in itertools.product((32, 64, 128, 256), (0, 256)):
        quantized = NF4Weight.quantize(weight, NF4Spec(block_size, group_size))
        error = (quantized.dequantize(torch.float32) - weight).norm() / weight.norm()
        row = {"block_size": block_size, "group_size": group_size, "bits_per_weight": quantized.bits_per_weight}
        rows.append(row | {"relative_error": error.item()})
    return rows


def print_speed(rows: list[dict[str, Any]]) -> None:
    print(origin()["device"])
    print(f"\n{'shape':>14} {'operation':<11}{'by':<14}{'GB/s':>8}{'device us':>11}{'call us':>10}")
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        device_us = f"{row['device_us']:.1f}" if row["device_us"] else "-"
        figures = f"{row['gb_per_s']:>8.1f}{device_us:>11}{row['call_us']:>10.1f}"
        print(f"{shape:>14} {row['operation']:<11}{row['by']:<14}{figures}")


def print_error(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'block':>6}{'group':>7}{'bits a weight':>15}{'relative error':>16}")
    for row in rows:
        sizes = f"{row['block_size']:>6}{row['group_size']:>7}"
        print(f"{sizes}{row['bits_per_weight']:>15.3f}{row['relative_error']:>16.5f}")


if __name__ == "__main__":
    main()
