"""What people say of LoRA and QLoRA, each with the figure that was found."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

NOT_YET = "*not measured yet*"
ELSEWHERE = "[benchmarks](../benchmarks/README.md)"
KINDS = ("text", "docstrings", "words")

Values = Mapping[str, Any]


class Results:
    """The kept results below a folder, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str) -> Values:
        values: Values = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        return values

    def rows(self, name: str) -> list[Values]:
        """None at all if the file is not there."""
        found: list[Values] = self.read(name)["rows"] if (self.folder / f"{name}.json").exists() else []
        return found

    def part(self, name: str) -> Values | None:
        """The comparison of a part of the grid."""
        return self.read(f"study/{name}")["comparison"] if (self.folder / f"study/{name}.json").exists() else None

    def parts(self) -> Iterator[tuple[str, Values]]:
        for file in sorted((self.folder / "study").glob("*.json")):
            if "comparison" in (values := self.read(f"study/{file.stem}")):
                yield file.stem, values["comparison"]


def claim_table(results: Results) -> Iterator[str]:
    yield "| # | as people say it | found |"
    yield "|---|---|---|"
    for number, (claim, found) in enumerate(claims(results), 1):
        yield f"| {number} | {claim} | {found} |"


def claims(results: Results) -> list[tuple[str, str]]:
    merging = merges(results)
    return [
        ("LoRA trains 10,000x fewer parameters", gpt3()),
        ("LoRA is close to full fine-tuning", differences(results, "full", "full above LoRA")),
        ("LoRA keeps the base in fp16 or bf16", "`model.storage`: bf16, fp16 or fp32"),
        ("NF4 is made for normal weights", normal_errors(results)),
        ("Double quantization saves ~0.5 bit", second_level(results)),
        ("QLoRA is 20-30 % slower than LoRA", slower(results)),
        ("Paged optimizers absorb spikes of memory", paging(results)),
        ("65B fine-tunes on one 48 GB GPU", seventy(results)),
        ("q and v, all attention, or all linear layers", "*Target modules*, below"),
        ("LoRA adapters merge for free inference", "; ".join([merging.get("lora", NOT_YET), *latency(results)])),
        ("QLoRA adapters merge after dequantizing", merging.get("qlora", NOT_YET)),
        ("QLoRA is within 1-2 % of LoRA", within(results)),
        ("QLoRA when memory binds, LoRA when not", "`nybble plan` says which, why and at what cost"),
        ("Compared on memory, speed, quality, hardware", "`nybble compare` writes one report of all four"),
        ("Guanaco matched GPT-4 on Vicuna", GUANACO),
    ]


GUANACO = (
    "not reproduced here; the paper's own figure is 99.3 % of *ChatGPT's* score, judged by GPT-4, "
    "so the popular version overstates it"
)


def gpt3() -> str:
    """GPT-3: 96 layers of width 12,288; A and B of rank 4 on q and v."""
    trained = 96 * 2 * (4 * 12288 + 12288 * 4)
    return f"r=4 on q and v of GPT-3's 175B shape: {trained / 1e6:.1f} M, {175e9 / trained:,.0f}x fewer"


def differences(results: Results, arm: str, words: str) -> str:
    found = [(kind, gap(results, f"quality-{kind}", arm)) for kind in KINDS]
    told = [
        f"{kind} {d['mean']:+.4f} nats [{d['interval']['low']:+.4f}, {d['interval']['high']:+.4f}]"
        for kind, d in found
        if d
    ]
    return f"{words}: {'; '.join(told)}" if told else NOT_YET


def gap(results: Results, part: str, arm: str) -> Values | None:
    comparison = results.part(part)
    return difference_of(comparison, arm) if comparison else None


def difference_of(comparison: Values, arm: str) -> Values | None:
    """Of the arm against the reference."""
    return next((found for found in comparison["differences"] if found["arm"] == arm), None)


def within(results: Results) -> str:
    """In percent of LoRA's loss, plain and prepared."""
    told = []
    for kind in KINDS:
        comparison = results.part(f"quality-{kind}")
        lora = next((a for a in comparison["arms"] if a["name"] == "lora"), None) if comparison else None
        losses = [run["loss"] for run in lora["runs"] if run["loss"] is not None] if lora else []
        for arm in ("qlora", "prepared", "calibrated"):
            found = gap(results, f"quality-{kind}", arm)
            if found and losses:
                told.append(f"{kind}, {arm} {found['mean'] * len(losses) / sum(losses):+.2%} ({found['verdict']})")
    return "; ".join(told) or NOT_YET


def normal_errors(results: Results) -> str:
    found = {
        row["format"]: row["relative_error"]
        for row in results.rows("study/formats")
        if row["weights"] == "normal" and row["block_size"] == 64 and row["rounding"] == "nearest"
    }
    told = ", ".join(f"{name.upper()} {error:.4f}" for name, error in found.items())
    return f"relative error on normal weights: {told}" if told else NOT_YET


def second_level(results: Results) -> str:
    bits = {
        row["double_quant"]: row["bits_per_weight"]
        for row in results.rows("study/formats")
        if row["weights"] == "normal" and row["format"] == "nf4" and row["block_size"] == 64
    }
    return f"{bits[False] - bits[True]:.3f} bit ({bits[False]:.3f} to {bits[True]:.3f})" if len(bits) == 2 else NOT_YET


def slower(results: Results) -> str:
    speeds = {row["row"]: row["tokens_per_second"] for row in results.rows("step_8b") if row["stack"] == "nybble"}
    qlora, fp8, lora = (speeds.get(f"{row} 4 2048 keep") for row in ("qlora bf16", "qlora fp8", "lora bf16"))
    if not (qlora and lora):
        return NOT_YET
    told = f"8B, 8k tokens a step: {1 - qlora / lora:.1%} slower"
    return f"{told}; {fp8 / lora:.2f}x as fast with fp8 products ({ELSEWHERE})" if fp8 else told


def paging(results: Results) -> str:
    rows = results.rows("memory_paging")
    if not rows:
        return NOT_YET
    failed, ended = (sum(("error" in row) == fails for row in rows) for fails in (True, False))
    told = f"{len(rows)} runs with a spike, {failed} that ran out of memory, {ended} that finished"
    found = {row["row"]: row for row in rows}
    seconds = [
        found.get(f"{lengths}, {moments}", {}).get(f"{lengths_of}_step_s")
        for lengths, lengths_of in (("one long", "short"), ("all long", "long"))
        for moments in ("paged, within the budget", "resident")
    ]
    if all(seconds):
        short, short_resident, long, long_resident = seconds
        told += (
            f"; beside resident moments without a budget, a short step takes {short / short_resident:.3f} of the time"
        )
        told += f" and one that pages {long / long_resident:.3f}"
    return f"{told} ({ELSEWHERE})"


def latency(results: Results) -> list[str]:
    """Of a token, beside the base's."""
    ratios = {row["model"]: row["ratio"] for row in results.rows("study/merged_speed")}
    if not ratios:
        return []
    card = results.read("study/merged_speed")["device"]
    merged, beside = (ratios[f"with the adapter {how}"] for how in ("merged", "beside it"))
    return [f"a token takes {merged:.2f} of the base's time, {beside:.2f} with the adapter beside it ({card})"]


def seventy(results: Results) -> str:
    rows = [row for row in results.rows("memory_steps_70b") if "peak_gib" in row]
    told = [f"`{row['row']}`: peak {row['peak_gib']:.1f} GiB, {row['tokens_per_second']:,.0f} tok/s" for row in rows]
    return f"{'; '.join(told)} ({ELSEWHERE})" if told else NOT_YET


def merges(results: Results) -> dict[str, str]:
    """Of an arm's first adapter: what its loss is merged."""
    comparison = results.part("quality-text")
    return {
        arm["name"]: "; ".join(
            f"into {m['base']} weights {m['merged_loss'] - m['adapter_loss']:+.4f} nats" for m in arm["merges"]
        )
        for arm in (comparison["arms"] if comparison else ())
        if arm["merges"]
    }
