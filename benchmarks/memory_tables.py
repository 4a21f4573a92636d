"""Tables of the memory benchmarks' kept results, in Markdown, for report.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from plan_check import summary
from work import Work

METHODS = {"lora": "LoRA", "qlora": "QLoRA"}

Figures = Mapping[str, Any]


def describe_work(text: str) -> str:
    """`8b 1x2048 memory.budget=5GiB` -> `8B QLoRA, 1 x 2048, within 5 GiB`."""
    work = Work.parse(text)
    config = work.config
    words = [f"{work.model.upper()} {METHODS[config.method]}", f"{work.batch} x {work.seq_len:,}"]
    if config.train.gradient_accumulation > 1:
        words[-1] += f" x {config.train.gradient_accumulation}"
    words += [f"r={config.lora.r}"] if config.lora.r != 16 else []
    words += ["fp8"] if config.train.precision == "fp8" else []
    words += [f"adapters in {config.lora.dtype}"] if config.lora.dtype != "fp32" else []
    words += [f"{config.optim.state_bits}-bit AdamW"] if config.optim.state_bits != 32 else []
    words += ["launched kernel by kernel"] if not config.train.cuda_graph else []
    words += ["deterministic kernels"] if config.train.deterministic else []
    if config.memory.budget != "all":
        words.append(f"within {config.memory.budget.removesuffix('GiB')} GiB")
    return ", ".join(words)


def _steps(rows: Sequence[Figures]) -> list[str]:
    heads = ["work", "tokens/s", "step s", "peak GiB (allocated)", "predicted", "held how", "loss", "gradient norm"]

    def figures(row: Figures) -> list[str]:
        seconds = f"{min(row['step_seconds']):.3f} to {max(row['step_seconds']):.3f}"
        losses, norms = row["loss"], row["grad_norm"]
        ends = [f"{losses[0]:.3f} -> {losses[-1]:.3f}", f"{norms[0]:.2f} -> {norms[-1]:.2f}"]
        speed, predicted = f"{row['tokens_per_second']:,.0f}", f"{row['predicted_gib']:.2f}"
        return [speed, seconds, _peak(row), predicted, _held(row), *ends]

    return _by_row(heads, rows, _work, figures)


def _peak(row: Figures) -> str:
    budget_bytes = Work.parse(row["row"]).config.memory.budget_bytes
    over = budget_bytes is not None and row["peak_gib"] * 2**30 > budget_bytes
    return f"{row['peak_gib']:.2f} ({row['peak_allocated_gib']:.2f})" + (", over its budget" if over else "")


def _held(row: Figures) -> str:
    """As planned, and what a step had to give up to fit: what was timed is then not what was planned."""
    notes = "\n".join(row["notes"])
    return "; ".join([row["plan"], *dict.fromkeys(re.findall("(the step was done again .*)", notes))])


def _long_context(rows: Sequence[Figures]) -> list[str]:
    heads = ["one complete step", "seconds", "peak GiB (allocated)", "host GiB", "held how", "loss", "gradient norm"]

    def figures(row: Figures) -> list[str]:
        held = [_peak(row), f"{row['host_peak_gib']:.0f}", _held(row)]
        return [f"{row['step_seconds'][0]:.0f}", *held, f"{row['loss'][0]:.3f}", f"{row['grad_norm'][0]:.2f}"]

    return _by_row(heads, rows, _work, figures)


def _plan_check(rows: Sequence[Figures]) -> list[str]:
    heads = ["setting", "held how", "predicted GiB", "measured GiB", "off", "tokens/s, predicted and measured"]

    def figures(row: Figures) -> list[str]:
        speeds = f"{row['predicted_tokens_per_second']:,.0f}, {row['tokens_per_second']:,.0f}"
        off = f"{row['off']:+.1%}" + ("" if row["verdict"] == "ok" else " **")
        return [_held(row), f"{row['predicted_gib']:.2f}", f"{row['peak_gib']:.2f}", off, speeds]

    return [*_by_row(heads, rows, _work, figures), "", f"{summary(rows)}."]


def _paging(rows: Sequence[Figures]) -> list[str]:
    heads = ["sequences, moments", "short step s", "long step s", "peak GiB", "loss, first -> last"]

    def figures(row: Figures) -> list[str]:
        seconds = [f"{row['short_step_s']:.3f}", f"{row['long_step_s']:.3f}"]
        return [*seconds, f"{row['peak_gib']:.2f}", f"{row['loss'][0]:.4f} -> {row['loss'][-1]:.4f}"]

    return _by_row(heads, rows, lambda row: row["row"], figures)


def _host_growth(rows: Sequence[Figures]) -> list[str]:
    heads = ["work", "steps", "host GiB, after a tenth of them and at the end", "growth MiB"]

    def figures(row: Figures) -> list[str]:
        settled = next(held for step, held in row["host_gib"] if step >= row["steps"] / 10)
        return [f"{row['steps']:,}", f"{settled:.3f}, {row['host_gib'][-1][1]:.3f}", f"{row['growth_mib']:.1f}"]

    return _by_row(heads, rows, _work, figures)


def _load(rows: Sequence[Figures]) -> list[str]:
    heads = ["checkpoint, 16 bit", "result GiB", "device beyond it GiB", "host beyond it GiB", "seconds"]

    def name(row: Figures) -> str:
        return f"{row['shape']} to {row['storage']}" if "storage" in row else row["shape"]

    def figures(row: Figures) -> list[str]:
        beyond = [_gib(row.get("device_peak_beyond_bytes")), _gib(row["host_peak_beyond_bytes"])]
        return [_gib(row["result_bytes"]), *beyond, f"{row['seconds']:.1f}"]

    return _by_row(heads, rows, name, figures)


def _merge(rows: Sequence[Figures]) -> list[str]:
    heads = ["merge", "result GiB", "host peak GiB", "device peak GiB", "seconds"]

    def name(row: Figures) -> str:
        return f"{row['shape']}, r={row['r']}" + (f" into the {row['base']} weights" if "base" in row else "")

    def figures(row: Figures) -> list[str]:
        peaks = [_gib(row["host_peak_bytes"]), _gib(row.get("device_peak_bytes"))]
        return [_gib(row["output_bytes"]), *peaks, f"{row['seconds']:.1f}"]

    return _by_row(heads, rows, name, figures)


def _by_row(
    heads: Sequence[str],
    rows: Sequence[Figures],
    name: Callable[[Figures], str],
    figures: Callable[[Figures], list[str]],
) -> list[str]:
    """A line a row, under `heads`: its name and its figures, or in their place how it failed."""
    failed = ["-"] * (len(heads) - 2)
    cells = [[name(row), *([_failure(row), *failed] if "error" in row else figures(row))] for row in rows]
    first, *others = (f"| {' | '.join(line)} |" for line in (heads, *cells))
    return [first, "|---" * len(heads) + "|", *others]


def _work(row: Figures) -> str:
    return describe_work(row["row"])


def _failure(row: Figures) -> str:
    return "out of memory" if "out of memory" in row["error"] else "failed"


def _gib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 2**30:.2f}"


# By the beginning of the names of the files that a table is made of.
MEMORY_TABLES: dict[str, Callable[[Sequence[Figures]], list[str]]] = {
    "memory_steps": _steps,
    "memory_long_context": _long_context,
    "memory_plan_check": _plan_check,
    "memory_paging": _paging,
    "memory_host_growth": _host_growth,
    "load_memory": _load,
    "merge_memory": _merge,
}
