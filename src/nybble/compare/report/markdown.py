"""The report as Markdown: everything but the pictures, whose figures stand in tables."""

from __future__ import annotations

from collections.abc import Iterable

from nybble.compare.report.content import Content, content
from nybble.compare.report.tables import Table
from nybble.compare.result import Comparison


def markdown_report(comparison: Comparison) -> str:
    said = content(comparison)
    blocks = [
        *_verdict(said),
        *_table(said.overview),
        *(
            block
            for section in said.sections
            for block in (f"## {section.title}", section.lead, *_tables(section.tables))
        ),
        *_samples(comparison),
        *_rerun(comparison, said),
    ]
    return "\n\n".join(blocks) + "\n"


def _verdict(said: Content) -> list[str]:
    lists = [_bullets(said.verdict.points), _bullets(f"Note: {caution}" for caution in said.verdict.cautions)]
    return [
        f"# {said.title}",
        said.subtitle,
        f"**{said.verdict.headline}** {said.verdict.because}",
        *filter(None, lists),
    ]


def _tables(tables: Iterable[Table]) -> list[str]:
    return [block for table in tables for block in _table(table)]


def _table(table: Table) -> list[str]:
    texts = {0} | {table.columns.index(name) for name in table.words}
    rule = [":--" if column in texts else "--:" for column in range(len(table.columns))]
    lines = [table.columns, rule, *table.rows]
    return [f"**{table.title}**", "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _samples(comparison: Comparison) -> list[str]:
    blocks = []
    for number, sample in enumerate(comparison.samples, start=1):
        answers = {"in the data": sample.expected, **sample.answers}
        blocks += [f"### Sample {number}", _fenced(sample.prompt)]
        blocks += [block for name, answer in answers.items() for block in (f"**{name}**", _fenced(answer))]
    return ["## Samples", *blocks] if blocks else []


def _rerun(comparison: Comparison, said: Content) -> list[str]:
    command = [_fenced(comparison.command)] if comparison.command else []
    settings = [block for title, text in said.settings for block in (f"**{title}**", _fenced(text.rstrip(), "yaml"))]
    return ["## To run it again", *command, _bullets(said.rerun), *settings]


def _fenced(text: str, language: str = "") -> str:
    """As a code block; the fence is longer than any in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"
