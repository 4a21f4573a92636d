"""Write the tables and pictures of the README and of benchmarks/README.md from the kept results.

python benchmarks/report.py            (after any run that changes benchmarks/results/)
A table stands between `<!-- NAME -->` and `<!-- /NAME -->`; a test checks that both files are up to date.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from memory_tables import MEMORY_TABLES
from stacks import Row

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
METHODS = {"lora": "LoRA", "qlora": "QLoRA"}
OURS = {"nybble": "nybble", "nybble-eager": "nybble, no graph", "nybble-generic": "nybble, stock modules"}
PEERS = {"unsloth": "Unsloth", "peft-liger": "PEFT + Liger", "peft": "PEFT"}
STACKS = OURS | PEERS
# What a step of QLoRA with r=16 runs at 8B and 4 x 2048, in the order of a block; the kept result has more.
KERNELS = (
    ("add_norm, r 16", "8192 x 4096"),
    ("norm_backward, r 48", "8192 x 4096"),
    ("split_rope, r 16", "8192 x 32+2*8 of 128"),
    ("rope_backward", "8192 x 32+2*8 of 128"),
    ("glu, r 16", "8192 x 14336"),
    ("glu_backward_, r 16", "8192 x 14336"),
    ("low_rank_backward_, r 16", "8192 x 14336+14336"),
    ("the same by cuBLAS, r 16", "8192 x 14336+14336"),
    ("low_rank_backward_, r 16", "8192 x 4096+1024+1024"),
    ("the same by cuBLAS, r 16", "8192 x 4096+1024+1024"),
    ("a_gradient_", "8192 x 14336 by 16"),
    ("cross_entropy_", "1024 x 128256"),
    ("adamw_ float32", "41943040"),
    ("adamw_8bit_ float32", "41943040"),
)
NOT_MEASURED = "*Not measured yet; `make bench` measures it.*\n"

Result = Mapping[str, Any]


def read(name: str) -> Result:
    result: Result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def tables() -> dict[str, str]:
    """All tables by name, in Markdown."""
    made: dict[str, tuple[str, Callable[[Result], list[str]]]] = {
        "step_8b": ("step_8b", _speeds),
        "step_8b_h100": ("step_8b_h100", _speeds),
        "step_smollm2": ("step_smollm2", _speeds),
        "step_8b_details": ("step_8b", _details),
        "step_8b_h100_details": ("step_8b_h100", _details),
        "step_smollm2_details": ("step_smollm2", _details),
        "step_smollm2_h100_details": ("step_smollm2_h100", _details),
        "check": ("check_step", _check),
        "curves": ("loss_curves", _curves),
        "packed": ("packed_chat", _packed),
        "load": ("load", _load),
        "nf4": ("nf4", _nf4),
        "kernels": ("kernels", _kernels),
        "parity": ("peft_parity", _parity),
    }
    of_memory = {name: _joint_table(name, lines) for name, lines in MEMORY_TABLES.items()}
    return {"demo": _demo()} | {name: _table(file, lines) for name, (file, lines) in made.items()} | of_memory


def updated(text: str) -> str:
    """`text` with all tables that it has a place for."""
    for name, table in tables().items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(pattern, lambda m, t=table: m[1] + t + m[2], text, flags=re.DOTALL)
    return text


def _table(file: str, lines: Callable[[Result], list[str]]) -> str:
    if not (RESULTS / f"{file}.json").exists():
        return NOT_MEASURED
    result = read(file)
    return _lines(result, lines(result))


def _joint_table(name: str, lines: Callable[[list[Result]], list[str]]) -> str:
    """Of one file, or where its rows were measured in parts of all files whose names begin like it."""
    whole = RESULTS / f"{name}.json"
    files = [whole] if whole.exists() else sorted(RESULTS.glob(f"{name}_*.json"))
    if not files:
        return NOT_MEASURED
    parts = [read(file.stem) for file in files]
    rows = [row for part in parts for row in part["rows"]]
    return "\n".join([*lines(rows), "", *dict.fromkeys(_origin(part) for part in parts), ""])


def _lines(result: Result, lines: list[str]) -> str:
    return "\n".join([*lines, "", _origin(result), ""])


def _origin(result: Result) -> str:
    rows = result["rows"] if isinstance(result["rows"], list) else []
    cards = dict.fromkeys([row["device"] for row in rows if "device" in row]) or [result["device"]]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    return f"{' and '.join(cards)}, {versions}, {result['date']}."


def _demo() -> str:
    """What `make demo` printed, without the lines of the steps."""
    if not (RESULTS / "demo.txt").exists():
        return NOT_MEASURED
    lines = (RESULTS / "demo.txt").read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("arm base"))
    table = next(i for i, line in enumerate(lines) if line.startswith("Same data"))
    shown = [line.rstrip().rstrip("─").rstrip() for line in [*lines[:first], "...", *lines[table:]]]
    return "\n".join(["```", *shown, "```", ""])


def _by_row(result: Result) -> dict[str, dict[str, Result]]:
    """Rows of figures by what is done, large ones first, and by stack, in the order of `STACKS`."""
    by_row: dict[str, dict[str, Result]] = {}
    for figures in result["rows"]:
        by_row.setdefault(figures["row"], {})[figures["stack"]] = figures
    return {row: {stack: by_row[row][stack] for stack in STACKS if stack in by_row[row]} for row in _ordered(by_row)}


def _ordered(rows: Iterable[str]) -> list[str]:
    """QLoRA before LoRA, then by shape; those of one shape stay as they were measured."""

    def shape(text: str) -> tuple[str, int, int]:
        row = Row.parse(text)
        return row.method, row.batch, row.seq_len

    return sorted(rows, key=shape, reverse=True)


def describe(row: Row) -> str:
    activations = {"keep": "kept", "recompute": "recomputed", "offload": "offloaded"}
    products = "" if row.precision == "bf16" else " fp8"
    moments = "" if row.state_bits == 32 else f", {row.state_bits}-bit AdamW"
    return f"{METHODS[row.method]}{products}, {row.batch} x {row.seq_len}, {activations[row.activations]}{moments}"


def _speeds(result: Result) -> list[str]:
    """A line a row and a column a stack: tokens a second and peak GiB."""
    by_row = _by_row(result)
    present = [stack for stack in STACKS if any(stack in of for of in by_row.values())]
    heads = ["method, sequences, activations", *(STACKS[stack] for stack in present), "to the fastest peer"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row, of in by_row.items():
        cells = [
            f"{of[stack]['tokens_per_second']:,} tok/s, {of[stack]['peak_allocated_gib']:.1f} GiB"
            if stack in of
            else "-"
            for stack in present
        ]
        lines.append(f"| {' | '.join([describe(Row.parse(row)), *cells, _ratio(of)])} |")
    return lines


def _ratio(of: Mapping[str, Result]) -> str:
    """Our first stack to the fastest peer on its card; older rows name no card and are compared among themselves."""
    ours = next((figures for stack, figures in of.items() if stack in OURS), {})
    peers = [f for stack, f in of.items() if stack in PEERS and f.get("device") == ours.get("device")]
    if not ours or not peers:
        return "-"
    return f"{ours['tokens_per_second'] / max(peer['tokens_per_second'] for peer in peers):.2f}x"


def _details(result: Result) -> list[str]:
    lines = [
        "| method, sequences, activations | stack | tokens/s | step s | peak, reserved, resident GiB | load s "
        "| loss, first -> last | gradient norm |",
        "|---" * 8 + "|",
    ]
    for row, of in _by_row(result).items():
        for stack, figures in of.items():
            losses, norms = figures["loss"], figures["grad_norm"]
            memory = ", ".join(
                f"{figures[f'{kind}_gib']:.1f}" for kind in ("peak_allocated", "peak_reserved", "resident")
            )
            seconds = f"{min(figures['step_seconds']):.3f} to {max(figures['step_seconds']):.3f}"
            cells = [describe(Row.parse(row)), STACKS[stack], f"{figures['tokens_per_second']:,}", seconds, memory]
            cells += [f"{figures['load_seconds']}", f"{losses[0]:.3f} -> {losses[-1]:.3f}"]
            lines.append(f"| {' | '.join([*cells, f'{norms[0]:.2f} -> {norms[-1]:.2f}'])} |")
    return lines


def _check(result: Result) -> list[str]:
    """Gradients beside float64's; the ratio is to the error of the stock modules, tensor by tensor."""
    lines = [
        "| gradients, two blocks of the 8B shape | largest error | of stock modules' | cosine | to the timed step's |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        if "failed" not in row:
            figures = f"{row['worst_error']:.4f} | {row['worst_ratio']:.2f}x | {row['cosine']:.6f}"
            figures += f" | {row['difference']:.1e}" if row["difference"] else " | 0"
            lines.append(f"| {METHODS[row['method']]}, {row['arm']} | {figures} |")
    return lines


def _curves(result: Result) -> list[str]:
    found = result["summary"]
    names = {
        "stock_to_stock": "stock modules, one run to the other",
        "fused_to_fused": "fused kernels in a graph, one run to the other",
        "fused_to_stock": "fused kernels to stock modules",
        "fp8_to_fused": "fp8 to bf16",
    }
    lines = ["| mean absolute difference of the loss | nats |", "|---|---|"]
    lines += [f"| {text} | {found[name]:.4f} |" for name, text in names.items() if name in found]
    if "held_out_fp8" in found:
        lines.append(f"| held-out loss in bf16, mean of three seeds | {found['held_out_fused']:.4f} |")
        lines.append(f"| held-out loss in fp8, mean of three seeds | {found['held_out_fp8']:.4f} |")
        lines.append(f"| fp8 worse by | {found['held_out_fp8_worse_by']:.4f} |")
    return lines


def _packed(result: Result) -> list[str]:
    lines = ["| data | tokens/s without padding | rows filled | samples a row |", "|---|---|---|---|"]
    for row in result["rows"]:
        work = f"{row['data']}, {describe(Row.parse(row['row']))}"
        most = f"up to {row['most_a_row']}" if "most_a_row" in row else "1"
        lines.append(f"| {work} | {row['real_tokens_per_second']:,} | {row['filled']:.1%} | {most} |")
    return lines


def _load(result: Result) -> list[str]:
    lines = ["| weights | run | from command to first step, s | of which loading, s |", "|---|---|---|---|"]
    for row in result["rows"]:
        if "failed" not in row:
            seconds = f"{row['first_step_seconds']:.1f} | {row['load_seconds']:.1f}"
            lines.append(f"| {row['weights']} | {row['run']} | {seconds} |")
    return lines


def _nf4(result: Result) -> list[str]:
    found = {(tuple(row["shape"]), row["operation"], row["by"]): row for row in result["rows"]}
    shapes = sorted({shape for shape, _, _ in found}, reverse=True)
    lines = [
        "| NF4 to bf16 | nybble GB/s | bitsandbytes GB/s | plain copy GB/s | share of the copy |",
        "|---|---|---|---|---|",
    ]
    for shape in shapes:
        ours, theirs, copy = (
            found[shape, operation, by]["gb_per_s"]
            for operation, by in (("dequantize", "nybble"), ("dequantize", "bitsandbytes"), ("copy", "torch"))
        )
        lines.append(f"| {shape[0]} x {shape[1]} | {ours:,.0f} | {theirs:,.0f} | {copy:,.0f} | {ours / copy:.0%} |")
    return lines


def _kernels(result: Result) -> list[str]:
    found = {(row["kernel"], row["shape"]): row for row in result["rows"]}
    lines = ["| kernel | shape | us | GB/s | share of a copy's |", "|---|---|---|---|---|"]
    for kernel, shape in KERNELS:
        row = found[kernel, shape]
        lines.append(
            f"| {kernel} | {shape} | {row['device_us']:.1f} | {row['gb_per_s']:,.0f} | {row['share_of_copy']:.0%} |"
        )
    return lines


def _parity(result: Result) -> list[str]:
    lines = [
        "| mean absolute difference of the loss | nybble to PEFT | PEFT to PEFT | nybble to nybble |",
        "|---|---|---|---|",
    ]
    for method, found in result["mean_absolute_difference"].items():
        pairs = [found.get(name) for name in ("nybble_to_peft", "peft_to_peft", "nybble_to_nybble")]
        cells = ["-" if value is None else f"{value:.4f}" for value in pairs]
        lines.append(f"| {METHODS[method]} | " + " | ".join(cells) + " |")
    return lines


def draw_speeds(path: Path) -> None:
    """Bars of tokens a second at 8B, by row and stack."""
    plt = _pyplot()
    result = read("step_8b")
    by_row = _by_row(result)
    bars = [(row, stack, figures) for row, of in by_row.items() for stack, figures in of.items()]
    figure, axes = plt.subplots(figsize=(9, 0.5 + 0.2 * len(bars) + 0.25 * len(by_row)), layout="constrained")
    place, middles, named = 0.0, [], set()
    for of in by_row.values():
        first = place
        for stack, figures in of.items():
            label = None if stack in named else STACKS[stack]
            named.add(stack)
            speed = figures["tokens_per_second"]
            axes.barh(place, speed, height=0.85, color=_COLOURS[stack], label=label)
            axes.text(speed, place, f" {speed:,}", va="center", fontsize=7)
            place += 1
        middles.append((first + place - 1) / 2)
        place += 1
    axes.set_yticks(middles, [describe(Row.parse(row)) for row in by_row], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"tokens a second, {result['device']}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    figure.legend(loc="outside upper center", ncols=len(named), fontsize=8, frameon=False)
    _save(figure, path)


def draw_curves(path: Path) -> None:
    """Loss of every parity run, and below it each run's distance from the first run of PEFT."""
    plt = _pyplot()
    rows = {row["arm"]: row["loss"] for row in read("peft_parity")["rows"]}
    figure, axes = plt.subplots(2, 2, figsize=(10, 5), sharex=True, height_ratios=(2, 1), layout="constrained")
    for column, method in enumerate(METHODS):
        reference = rows[f"peft-{method}-1"]
        for arm, losses in rows.items():
            stack, its_method, run = arm.split("-")
            if its_method != method:
                continue
            style = {"color": _COLOURS[stack], "linestyle": "-" if run == "1" else "--", "linewidth": 1}
            axes[0, column].plot(losses, label=f"{STACKS[stack]}, run {run}", **style)
            axes[1, column].plot([a - b for a, b in zip(losses, reference, strict=True)], **style)
        axes[0, column].set_title(f"{METHODS[method]}, SmolLM2-135M, 16 x 512 tokens a step", fontsize=10)
        axes[1, column].set_xlabel("step")
    axes[0, 0].set_ylabel("loss (nats)")
    axes[1, 0].set_ylabel("difference to PEFT, run 1")
    axes[0, 1].legend(fontsize=8)
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "nybble"  # the same figures give the same file
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


_COLOURS = {
    "nybble": "#0b6e4f",
    "nybble-eager": "#3f9c7c",
    "nybble-generic": "#8cc7b0",
    "unsloth": "#3d5a80",
    "peft-liger": "#e09f3e",
    "peft": "#c1440e",
}


def main() -> None:
    for readme in (ROOT / "README.md", ROOT / "benchmarks" / "README.md"):
        readme.write_text(updated(readme.read_text(encoding="utf-8")), encoding="utf-8")
    for name, draw, image in (("step_8b", draw_speeds, "speed"), ("peft_parity", draw_curves, "parity")):
        if (RESULTS / f"{name}.json").exists():
            draw(IMAGES / f"{image}.svg")


if __name__ == "__main__":
    main()
