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
    words += [f"{config.optim.state_bits}-bit AdamW"] if config.optim.state_bits != 32 else []
    words += ["launched kernel by kernel"] if not config.train.cuda_graph else []
    if config.memory.budget != "all":
        words.append(f"within {config.memory.budget.removesuffix('GiB')} GiB")
    return ", ".join(words)


def _steps(rows: Sequence[Figures]) -> list[str]:
    heads = ["work", "tokens/s", "step s", "peak GiB (allocated)", "predicted", "held how", "loss", "gradient norm"]
    return _table(heads, [[describe_work(row["row"]), *_figures(row)] for row in rows])


def _figures(row: Figures) -> list[str]:
    if "error" in row:
        return [_failure(row), *["-"] * 6]
    seconds = f"{min(row['step_seconds']):.3f} to {max(row['step_seconds']):.3f}"
    peak = _peak(row)
    losses, norms = row["loss"], row["grad_norm"]
    ends = [f"{losses[0]:.3f} -> {losses[-1]:.3f}", f"{norms[0]:.2f} -> {norms[-1]:.2f}"]
    return [f"{row['tokens_per_second']:,.0f}", seconds, peak, f"{row['predicted_gib']:.2f}", _held(row), *ends]


def _peak(row: Figures) -> str:
    budget_bytes = Work.parse(row["row"]).config.memory.budget_bytes
    over = budget_bytes is not None and row["peak_gib"] * 2**30 > budget_bytes
    return f"{row['peak_gib']:.2f} ({row['peak_allocated_gib']:.2f})" + (", over its budget" if over else "")


def _failure(row: Figures) -> str:
    return "out of memory" if "out of memory" in row["error"] else "failed"


def _held(row: Figures) -> str:
    """As planned, and what a step had to give up to fit: what was timed is then not what was planned."""
    notes = "\n".join(row["notes"])
    return "; ".join([row["plan"], *dict.fromkeys(re.findall("(the step was done again .*)", notes))])


def _long_context(rows: Sequence[Figures]) -> list[str]:
    heads = ["one complete step", "seconds", "peak GiB (allocated)", "host GiB", "held how", "loss", "gradient norm"]
    cells = []
    for row in rows:
        if "error" in row:
            figures = [_failure(row), *["-"] * 5]
        else:
            peak = _peak(row)
            figures = [f"{row['step_seconds'][0]:.0f}", peak, f"{row['host_peak_gib']:.0f}", _held(row)]
            figures += [f"{row['loss'][0]:.3f}", f"{row['grad_norm'][0]:.2f}"]
        cells.append([describe_work(row["row"]), *figures])
    return _table(heads, cells)


def _plan_check(rows: Sequence[Figures]) -> list[str]:
    heads = ["setting", "held how", "predicted GiB", "measured GiB", "off", "tokens/s, predicted and measured"]
    cells = []
    for row in rows:
        if "error" in row:
            figures = ["-", "-", _failure(row), "-", "-"]
        else:
            speeds = f"{row['predicted_tokens_per_second']:,.0f}, {row['tokens_per_second']:,.0f}"
            off = f"{row['off']:+.1%}" + ("" if row["verdict"] == "ok" else " **")
            figures = [_held(row), f"{row['predicted_gib']:.2f}", f"{row['peak_gib']:.2f}", off, speeds]
        cells.append([describe_work(row["row"]), *figures])
    return [*_table(heads, cells), "", f"{summary(rows)}."]


def _paging(rows: Sequence[Figures]) -> list[str]:
    heads = ["sequences, moments", "short step s", "long step s", "peak GiB", "loss, first -> last"]
    cells = []
    for row in rows:
        if "error" in row:
            figures = [_failure(row), "-", "-", "-"]
        else:
            figures = [f"{row['short_step_s']:.3f}", f"{row['long_step_s']:.3f}", f"{row['peak_gib']:.2f}"]
            figures.append(f"{row['loss'][0]:.4f} -> {row['loss'][-1]:.4f}")
        cells.append([row["row"], *figures])
    return _table(heads, cells)


def _host_growth(rows: Sequence[Figures]) -> list[str]:
    heads = ["work", "steps", "host GiB, after a tenth of them and at the end", "growth MiB"]
    cells = []
    for row in rows:
        if "error" in row:
            cells.append([describe_work(row["row"]), _failure(row), "-", "-"])
            continue
        settled = next(held for step, held in row["host_gib"] if step >= row["steps"] / 10)
        ends = f"{settled:.3f}, {row['host_gib'][-1][1]:.3f}"
        cells.append([describe_work(row["row"]), f"{row['steps']:,}", ends, f"{row['growth_mib']:.1f}"])
    return _table(heads, cells)


def _load(rows: Sequence[Figures]) -> list[str]:
    heads = ["checkpoint, 16 bit", "result GiB", "device beyond it GiB", "host beyond it GiB", "seconds"]
    cells = []
    for row in rows:
        figures = ["failed", "-", "-", "-"]
        if "error" not in row:
            device = row.get("device_peak_beyond_bytes")
            figures = [_gib(row["result_bytes"]), "-" if device is None else _gib(device)]
            figures += [_gib(row["host_peak_beyond_bytes"]), f"{row['seconds']:.1f}"]
        cells.append([f"{row['shape']} to {row['storage']}" if "storage" in row else row["shape"], *figures])
    return _table(heads, cells)


def _merge(rows: Sequence[Figures]) -> list[str]:
    heads = ["merge", "result GiB", "host peak GiB", "device peak GiB", "seconds"]
    cells = []
    for row in rows:
        figures = ["failed", "-", "-", "-"]
        if "error" not in row:
            device = row.get("device_peak_bytes")
            figures = [_gib(row["output_bytes"]), _gib(row["host_peak_bytes"]), "-" if device is None else _gib(device)]
            figures.append(f"{row['seconds']:.1f}")
        base = f" into the {row['base']} weights" if "base" in row else ""
        cells.append([f"{row['shape']}, r={row['r']}{base}", *figures])
    return _table(heads, cells)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


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
