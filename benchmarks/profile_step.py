"""Where the time of a training step goes: kernels by class, beside what this card could do at best.

python benchmarks/profile_step.py --model FOLDER --row "qlora bf16 4 2048 keep" [--stack nybble] --output FILE
The limit of a class is its floating-point operations over the speed of a large matrix product on this card, or its
bytes, each counted once, over the speed of a large copy. Products beside the adapters' (x A^T and its gradients) are
told from those with frozen weights by their time: they are shorter than any of those can be.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from results import origin
from stacks import STACKS, Adapter, Row, Stack
from torch.profiler import ProfilerActivity, profile

WARM_UP, TIMED, PROFILED = 5, 5, 3

GEMM, ADAPTER = "matrix products", "adapter products"
# The first pattern that is found in a kernel's name, in lower case, tells its class.
PATTERNS = (
    ("copies", r"^mem(cpy|set)"),
    ("attention", r"flash|fmha|sdpa|attention|attn"),
    ("loss", r"cross_?entropy|softmax|nll"),
    ("optimizer", r"adam|normtwo|lpnorm"),
    (ADAPTER, r"low_?rank|splitk|lora"),
    (GEMM, r"gemm|gemv|nvjet|cutlass|cublas|matmul"),
    ("quantize, dequantize", r"quant|nf4|^transpose_kernel"),
    ("norm, rotation, GLU", r"norm|rope|rotary|glu|silu|fg_kernel"),
)
OTHER, GAPS = "other", "gaps"
CLASSES = (
    GEMM,
    ADAPTER,
    "attention",
    "quantize, dequantize",
    "norm, rotation, GLU",
    "loss",
    "optimizer",
    "copies",
    OTHER,
)


@dataclass(frozen=True)
class Kernel:
    """Something that ran on the device; times in microseconds."""

    name: str
    start: float
    duration: float

    @property
    def end(self) -> float:
        return self.start + self.duration


@dataclass(frozen=True)
class Card:
    """What this card does at best, measured: FLOP/s of products of 8192 x 8192 by 8192, bytes/s of a copy."""

    bf16_flops: float
    fp8_flops: float
    copied_bytes: float


@dataclass(frozen=True)
class Shape:
    """A Llama-like model. Features: of hidden states, of all q, k and v together, of all q, of the MLP."""

    layers: int
    hidden: int
    qkv: int
    queries: int
    intermediate: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        qkv = (heads + 2 * kv_heads) * head_dim
        sizes = config.hidden_size, qkv, heads * head_dim, config.intermediate_size, config.vocab_size
        return cls(config.num_hidden_layers, *sizes)

    @property
    def products(self) -> list[tuple[int, int]]:
        """(out, in) of a layer's frozen weights, those that read the same input as one."""
        hidden, wide = self.hidden, self.intermediate
        return [(self.qkv, hidden), (hidden, self.queries), (2 * wide, hidden), (hidden, wide)]


def limits(shape: Shape, row: Row, trainable: int, card: Card) -> dict[str, float]:
    """The seconds that each class needs at least, where that can be said simply."""
    passes = 1 if row.activations == "keep" else 2  # forward ones
    tokens, layers, fp8 = row.tokens, shape.layers, row.precision == "fp8"
    weights = layers * sum(out * inner for out, inner in shape.products)
    inputs, outputs = (sum(sizes) for sizes in zip(*((inner, out) for out, inner in shape.products), strict=True))
    head = 2 * 2 * tokens * shape.hidden * shape.vocabulary
    attended = 2 * tokens * row.seq_len * shape.queries * layers  # half of the scores are masked
    held = 0.516 if row.method == "qlora" else 2.0  # bytes a weight; NF4 takes 4.127 bits
    quantized = 0.0
    if row.method == "qlora" or fp8:
        quantized += (passes + 1) * weights * (held + (1 if fp8 else 2))
    if fp8:
        quantized += 3 * tokens * layers * (passes * (inputs - 2 * shape.hidden) + outputs)
    # Values read and written, forward and backward: 4 and 4 a norm, half of one more in fp8, 2 and 2 a rotation, 3 and
    # 6 SwiGLU.
    forward = 2 * (4.5 if fp8 else 4) * shape.hidden + 2 * shape.qkv + 3 * shape.intermediate
    backward = 2 * 4 * shape.hidden + 2 * shape.qkv + 6 * shape.intermediate
    num_bytes = {
        ADAPTER: 2 * tokens * layers * ((passes + 1) * inputs + outputs),
        "quantize, dequantize": quantized,
        "norm, rotation, GLU": 2 * tokens * layers * (passes * forward + backward),
        "loss": 2 * 3 * tokens * shape.vocabulary,
        "optimizer": trainable * (36 if row.state_bits == 32 else 24),  # with the norm of the gradients and zeroing
    }
    seconds = {name: count / card.copied_bytes for name, count in num_bytes.items()}
    frozen = 2 * tokens * weights * (passes + 1)
    seconds[GEMM] = frozen / (card.fp8_flops if fp8 else card.bf16_flops) + head / card.bf16_flops
    seconds["attention"] = attended * (passes + 2.5) / card.bf16_flops
    return seconds


def shortest_product_us(shape: Shape, row: Row) -> float:
    """Less than any product with a layer's frozen weights takes: at 2 PFLOP/s, which no card here reaches."""
    return min(2 * row.tokens * out * inner for out, inner in shape.products) / 2e15 * 1e6


def class_of(kernel: Kernel, shortest_us: float) -> str:
    name = kernel.name.lower()
    found = next((label for label, pattern in PATTERNS if re.search(pattern, name)), OTHER)
    return ADAPTER if found == GEMM and kernel.duration < shortest_us else found


def kernels_in(trace: dict[str, Any]) -> list[Kernel]:
    """What ran on the device, from a profiler's trace in Chrome's format, in order of time."""
    ran = ("kernel", "gpu_memcpy", "gpu_memset")
    events = [event for event in trace["traceEvents"] if event.get("cat") in ran]
    kernels = [Kernel(event["name"], float(event["ts"]), float(event["dur"])) for event in events]
    return sorted(kernels, key=lambda kernel: kernel.start)


def busy_us(kernels: list[Kernel]) -> float:
    """The time in which anything ran."""
    busy, until = 0.0, float("-inf")
    for kernel in kernels:
        busy += max(0.0, kernel.end - max(kernel.start, until))
        until = max(until, kernel.end)
    return busy


def table(kernels: list[Kernel], steps: int, shortest_us: float, limit_s: dict[str, float]) -> list[str]:
    """Lines of milliseconds a step by class. Shares are of the time from the first kernel to the last."""
    span = (max(kernel.end for kernel in kernels) - kernels[0].start) / steps
    by_class: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        by_class[class_of(kernel, shortest_us)].append(kernel.duration)
    lines = [f"{'class':24}{'launches':>9}{'ms':>10}{'share':>8}{'limit ms':>10}{'of limit':>10}"]
    for name in CLASSES:
        spent = sum(by_class[name]) / steps / 1e3
        limit = limit_s.get(name, 0.0) * 1e3
        limited = f"{limit:>10.2f}{limit / spent:>10.0%}" if limit and spent else ""
        lines.append(f"{name:24}{len(by_class[name]) / steps:>9.0f}{spent:>10.2f}{1e3 * spent / span:>8.1%}{limited}")
    gaps = span - busy_us(kernels) / steps
    lines.append(f"{GAPS:24}{'':>9}{gaps / 1e3:>10.2f}{gaps / span:>8.1%}")
    total = sum(limit_s.values()) * 1e3
    lines.append(
        f"{'step':24}{len(kernels) / steps:>9.0f}{span / 1e3:>10.2f}{'':>8}{total:>10.2f}{1e3 * total / span:>10.0%}"
    )
    return lines


def longest(kernels: list[Kernel], steps: int, shortest_us: float, count: int = 40) -> list[str]:
    by_name: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        by_name[kernel.name].append(kernel)
    lines = [f"{'ms':>9}{'launches':>9}{'median us':>11}  {'class':24}kernel"]
    for name, same in sorted(by_name.items(), key=lambda item: -sum(k.duration for k in item[1]))[:count]:
        spent, median = sum(k.duration for k in same), statistics.median(k.duration for k in same)
        classes = "/".join(dict.fromkeys(class_of(kernel, shortest_us) for kernel in same))
        lines.append(f"{spent / steps / 1e3:>9.3f}{len(same) / steps:>9.0f}{median:>11.1f}  {classes:24}{name[:110]}")
    return lines


def measure_card() -> Card:
    from nybble.ops.fp8 import fp8_matmul, fp8_quantize_rows

    size = 8192
    x = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    bf16 = 2 * size**3 / median_s(lambda: x @ x)
    try:
        quantized, scale = fp8_quantize_rows(x, None)
        fp8 = 2 * size**3 / median_s(lambda: fp8_matmul(quantized, scale, quantized, scale.t()))
    except RuntimeError:  # a card without fp8
        fp8 = bf16
    return Card(bf16, fp8, 2 * source.nbytes / median_s(lambda: target.copy_(source)))


def median_s(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    milliseconds: float = do_bench(call, return_mode="median")
    return milliseconds / 1e3


def profiled(stack: Stack, row: Row) -> tuple[float, list[Kernel]]:
    """The median step without a profiler, in seconds, and what ran in some steps with one."""
    shape = (WARM_UP + TIMED + PROFILED, row.batch, row.seq_len)
    windows = torch.randint(10, 250, shape, generator=torch.Generator().manual_seed(0))
    steps = stack.steps(row, windows)
    seconds = [record.seconds for record in itertools.islice(steps, WARM_UP + TIMED)][WARM_UP:]
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in itertools.islice(steps, PROFILED):
            pass
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        kernels = kernels_in(json.loads(Path(file.name).read_text()))
    assert kernels, "the profiler saw no kernel"
    return statistics.median(seconds), kernels


def report(stack: Stack, row: Row, card: Card, seconds: float, kernels: list[Kernel]) -> list[str]:
    shape = Shape.of(stack.model.config)
    trainable = sum(p.numel() for p in stack.model.parameters() if p.requires_grad)
    shortest = shortest_product_us(shape, row)
    flops = f"bf16 {card.bf16_flops / 1e12:.0f} TFLOP/s, fp8 {card.fp8_flops / 1e12:.0f} TFLOP/s"
    return [
        *table(kernels, PROFILED, shortest, limits(shape, row, trainable, card)),
        "",
        f"without the profiler {seconds * 1e3:.1f} ms a step, {row.tokens / seconds:,.0f} tokens/s",
        f"this card: {flops}, copy {card.copied_bytes / 1e9:,.0f} GB/s",
        *stack.notes,
        "",
        *longest(kernels, PROFILED, shortest),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--row", type=Row.parse, default="qlora bf16 4 2048 keep")
    parser.add_argument("--stack", default="nybble", choices=list(STACKS))
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/profile_STACK_ROW.txt")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("the benchmark needs an NVIDIA GPU")
    started = time.perf_counter()
    card = measure_card()
    stack = STACKS[options.stack](options.model, options.row, Adapter(), longest=options.row.seq_len)
    stack.prepare(options.row)
    seconds, kernels = profiled(stack, options.row)
    lines = report(stack, options.row, card, seconds, kernels)
    about = origin()
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    header = [
        f"{options.stack}, {options.row}, {Path(options.model).name}",
        f"{about['device']}, {versions}, {about['date']}",
    ]
    default = Path("benchmarks/results") / f"profile_{options.stack}_{options.row}.txt".replace(" ", "_")
    output: Path = options.output or default
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join([*header, about["command"], "", *lines]) + "\n", encoding="utf-8")
    print("\n".join([*header, "", *lines]))
    print(f"\nwritten to {output} after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
