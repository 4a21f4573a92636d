"""Samples as the model will see them, with the trained tokens marked: the check to make before every run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from nybble.data.example import Example
from nybble.data.prepare import DataReport, PreparedData
from nybble.units import format_count

TRAINED = "bold green underline"
_OPEN, _CLOSE = "⟦", "⟧"  # the same in plain text, where there are no colours
_SHOWN_TOKENS = 600


def render_preview(prepared: PreparedData, tokenizer: PreTrainedTokenizerBase, *, samples: int = 3) -> RenderableType:
    """The first samples and what became of all rows, to be printed by rich; trained tokens are coloured and in ⟦⟧."""
    legend = Text.assemble(
        "Loss on ", (f"{_OPEN}these tokens{_CLOSE}", TRAINED), " only; special tokens are shown as text."
    )
    panels = [_panel(example, tokenizer) for example in prepared.train[:samples]]
    summary = [_summary("Training", prepared.report)]
    if prepared.validation_report:
        summary.append(_summary("Held out", prepared.validation_report))
    return Group(legend, *panels, *summary)


def preview_figures(prepared: PreparedData, tokenizer: PreTrainedTokenizerBase, *, samples: int = 3) -> dict[str, Any]:
    """The same as plain values: both reports, and the samples with their text and trained parts."""
    return {
        "report": asdict(prepared.report),
        "validation_report": asdict(prepared.validation_report) if prepared.validation_report else None,
        "samples": [_figures(example, tokenizer) for example in prepared.train[:samples]],
    }


def trained_runs(example: Example) -> Iterator[tuple[bool, list[int]]]:
    """Token ids in runs of one kind, trained or not."""
    changes = (example.trained[1:] != example.trained[:-1]).nonzero().flatten() + 1
    for ids, trained in zip(
        example.input_ids.tensor_split(changes.tolist()), example.trained.tensor_split(changes.tolist()), strict=True
    ):
        yield bool(trained[0]), ids.tolist()


def _panel(example: Example, tokenizer: PreTrainedTokenizerBase) -> Panel:
    text = Text()
    shown = 0
    for trained, ids in trained_runs(example):
        part = tokenizer.decode(ids[: _SHOWN_TOKENS - shown], skip_special_tokens=False)
        text.append(f"{_OPEN}{part}{_CLOSE}" if trained else part, style=TRAINED if trained else "")
        shown += len(ids)
        if shown >= _SHOWN_TOKENS:
            text.append(f" ... {len(example) - _SHOWN_TOKENS} tokens more", style="italic")
            break
    packed = f", {len(example.lengths)} samples packed" if len(example.lengths) > 1 else ""
    title = f"row {example.row + 1}: {example.target_tokens} of {len(example)} tokens trained{packed}"
    return Panel(text, title=Text(title), title_align="left")


def _summary(name: str, report: DataReport) -> Text:
    facts = [
        f"{report.rows} rows ({', '.join(report.formats)})",
        f"{report.samples} samples",
        f"{format_count(report.tokens)} tokens, {format_count(report.target_tokens)} of them trained",
        f"longest {report.longest}",
        f"{report.truncated} cut",
        f"{report.dropped} dropped",
    ]
    if report.sequences != report.samples - report.dropped:
        facts.append(f"packed into {report.sequences} sequences with {report.padding_share:.1%} padding")
    if report.altered:
        facts.append(f"{report.altered} answers are rendered otherwise than written")
    if report.duplicates:
        facts.append(f"{report.duplicates} rows are also training rows")
    return Text(f"{name}: {'; '.join(facts)}.")


def _figures(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    runs = [(trained, tokenizer.decode(ids, skip_special_tokens=False)) for trained, ids in trained_runs(example)]
    return {
        "row": example.row + 1,
        "tokens": len(example),
        "target_tokens": example.target_tokens,
        "text": "".join(part for _, part in runs),
        "trained": [part for trained, part in runs if trained],
    }
