"""Write the README's tables and the picture of the loss curves from the kept results.

python benchmarks/report.py            (after any run that changes benchmarks/results/)
A table stands between `<!-- NAME -->` and `<!-- /NAME -->`; a test checks that the README is up to date.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
METHODS = {"lora": "LoRA", "qlora": "QLoRA"}
STACKS = {"nybble": "nybble", "peft": "PEFT"}


def read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def tables() -> dict[str, str]:
    """The README's tables by name, in Markdown."""
    return {
        "demo": _demo(),
        "step_8b": _steps("step_8b"),
        "step_smollm2": _steps("step_smollm2"),
        "nf4": _nf4(),
        "parity": _parity(),
    }


def updated(readme: str) -> str:
    for name, table in tables().items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        readme, found = re.subn(pattern, lambda m, t=table: m[1] + t + m[2], readme, flags=re.DOTALL)
        assert found, f"README.md has no place for the table {name}"
    return readme


def _demo() -> str:
    """What `make demo` printed, without the lines of the steps."""
    lines = (RESULTS / "demo.txt").read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("arm base"))
    table = next(i for i, line in enumerate(lines) if line.startswith("Same data"))
    shown = [line.rstrip().rstrip("─").rstrip() for line in [*lines[:first], "...", *lines[table:]]]
    return "\n".join(["```", *shown, "```", ""])


def _steps(name: str) -> str:
    result = read(name)
    lines = [
        "| method, tokens a step | stack | tokens/s | peak GiB | resident GiB | loss, first -> last | gradient norm |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        method, batch, seq_len, activations = row["row"].split()
        stack = f"PEFT{' + bitsandbytes' if method == 'qlora' else ''}" if row["stack"] == "peft" else "nybble"
        work = f"{METHODS[method]}, {batch} x {seq_len}, activations {_ACTIVATIONS[activations]}"
        losses, norms = row["loss"], row["grad_norm"]
        lines.append(
            f"| {work} | {stack} | {row['tokens_per_second']:,} | {row['peak_allocated_gib']} | {row['resident_gib']} "
            f"| {losses[0]:.3f} -> {losses[-1]:.3f} | {norms[0]:.2f} -> {norms[-1]:.2f} |"
        )
    return "\n".join([*lines, "", _origin(result), ""])


_ACTIVATIONS = {"recompute": "recomputed", "kept": "kept"}


def _nf4() -> str:
    result = read("nf4")
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
    return "\n".join([*lines, "", _origin(result), ""])


def _parity() -> str:
    result = read("peft_parity")
    lines = [
        "| mean absolute difference of the loss | nybble to PEFT | PEFT to PEFT | nybble to nybble |",
        "|---|---|---|---|",
    ]
    for method, found in result["mean_absolute_difference"].items():
        pairs = [found[name] for name in ("nybble_to_peft", "peft_to_peft", "nybble_to_nybble")]
        lines.append(f"| {METHODS[method]} | " + " | ".join(f"{value:.4f}" for value in pairs) + " |")
    return "\n".join([*lines, "", _origin(result), ""])


def _origin(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    return f"{result['device']}, {versions}, {result['date']}."


def draw_curves(path: Path) -> None:
    """Loss of every parity run, and below it each run's distance from the first run of PEFT."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "nybble"  # the same figures give the same file
    from matplotlib import pyplot as plt

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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


_COLOURS = {"nybble": "#0b6e4f", "peft": "#c1440e"}


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text(encoding="utf-8")), encoding="utf-8")
    draw_curves(ROOT / "docs" / "images" / "parity.svg")


if __name__ == "__main__":
    main()
