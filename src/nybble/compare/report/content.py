"""What a report says, in its order: the page and Markdown differ in how they show it alone."""

from __future__ import annotations

from dataclasses import dataclass

import yaml

from nybble.compare.report import tables
from nybble.compare.report.tables import Table
from nybble.compare.report.verdict import give_verdict
from nybble.compare.report.words import listed
from nybble.compare.result import Advice, Comparison
from nybble.units import format_bytes, format_seconds, plural


@dataclass(frozen=True)
class Section:
    """key: which picture stands with it, if there is one."""

    key: str
    title: str
    lead: str
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Content:
    """settings: those that all arms share, then what each arm changes, as YAML by title."""

    title: str
    subtitle: str
    verdict: Advice
    overview: Table
    sections: tuple[Section, ...]
    rerun: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]


def content(comparison: Comparison) -> Content:
    sections = (
        Section(
            "quality",
            "Quality",
            _quality(comparison),
            (tables.differences(comparison), tables.quality(comparison), tables.answers(comparison)),
        ),
        Section("curves", "Loss curves", _curves(comparison), tables.curves(comparison)),
        Section("memory", "Memory", _memory(comparison), (tables.memory(comparison),)),
        Section("speed", "Speed", _speed(comparison), (tables.costs(comparison),)),
        Section("merges", "Merging", _MERGES, (tables.merges(comparison),)),
        Section("sweeps", "Learning rates", _sweeps(comparison), (tables.sweeps(comparison),)),
        Section("runs", "Runs", "All of them, failed ones too.", (tables.runs(comparison),)),
    )
    with_figures = tuple(
        Section(section.key, section.title, section.lead, tuple(table for table in section.tables if table.rows))
        for section in sections
    )
    return Content(
        title=comparison.title,
        subtitle=_subtitle(comparison),
        verdict=comparison.verdict or give_verdict(comparison),
        overview=tables.overview(comparison),
        sections=tuple(section for section in with_figures if section.tables),
        rerun=_rerun(comparison),
        settings=_settings(comparison),
    )


def _subtitle(comparison: Comparison) -> str:
    machine, seeds = comparison.machine, len(comparison.statement.seeds)
    return (
        f"{machine.name}, {format_bytes(machine.memory_bytes)}. Same data, order and seeds for every arm: "
        f"{comparison.train_rows:,} rows ({comparison.train_tokens:,} tokens) to train on, "
        f"{plural(comparison.test.rows, 'row')} held out to measure by, {plural(seeds, 'seed')}. "
        f"It took {format_seconds(comparison.seconds)}."
    )


def _quality(comparison: Comparison) -> str:
    statement = comparison.statement
    answers = (
        " Answers are the likeliest tokens; exact match wants the same text but for white space, "
        "ROUGE-L is the F1 of the longest sequence of words that both have."
    )
    return (
        f"Margin and seeds were laid down before the first run ({statement.stated_at}): an arm is not worse than "
        f"{statement.reference} if its whole interval lies below {statement.margin:g} nats. Differences are paired by "
        f"seed and by test row. Results are of {_rows(comparison)}.{answers if comparison.score_names else ''}"
    )


def _rows(comparison: Comparison) -> str:
    test, validation = comparison.test, comparison.validation
    text = f"{plural(test.rows, 'test row')} with {sum(test.target_tokens):,} target tokens ({test.source})"
    if test == validation:
        return f"{text}, which chose checkpoints too"
    if not validation.rows:
        return f"{text}, by which nothing was chosen"
    chose = f"{plural(validation.rows, 'validation row')} ({validation.source}) chose learning rates and checkpoints"
    return f"{text}; {chose}"


def _curves(comparison: Comparison) -> str:
    several = any(len(arm.finished) > 1 for arm in comparison.arms)
    band = " Lines are means over the seeds, bands reach from the best seed to the worst." if several else ""
    return f"Nats a token.{band}"


def _memory(comparison: Comparison) -> str:
    predicted = any(arm.predicted_bytes for arm in comparison.arms)
    more = (
        " Under a measured peak stands what the planner expected before the run, by what holds it." if predicted else ""
    )
    where = "the device" if comparison.machine.device == "cuda" else "the process in host memory"
    return f"The peak of {where} in each phase of a run, the largest over the seeds.{more}"


def _speed(comparison: Comparison) -> str:
    text = "Tokens a second of the median step, prompts counted."
    if comparison.common_loss is None:
        return text
    return f"{text} {comparison.common_loss:.4f} is the lowest {comparison.common_loss_of} loss that every arm reached."


_MERGES = (
    "An adapter on a quantized base may be merged into other weights than those it was trained on: the loss says which."
)


def _sweeps(comparison: Comparison) -> str:
    if comparison.test == comparison.validation:
        return "Chosen on the rows that results are measured on: no others are held out."
    return "Chosen on validation rows, which are not those that results are measured on."


def _rerun(comparison: Comparison) -> tuple[str, ...]:
    statement, machine = comparison.statement, comparison.machine
    rates = listed([f"{rate:g}" for rate in statement.learning_rates])
    return (
        f"Results: {comparison.output}",
        f"Reference {statement.reference}, margin {statement.margin:g} nats, {100 * statement.level:g}% intervals, "
        f"seeds {listed([str(seed) for seed in statement.seeds])}{f', learning rates {rates} tried' if rates else ''}; "
        f"stated {statement.stated_at}",
        f"Machine: {machine.name} ({machine.device}, {format_bytes(machine.memory_bytes)}), "
        f"{plural(machine.cores, 'CPU core')}",
        f"Versions: {', '.join(f'{name} {version}' for name, version in machine.versions.items())}",
    )


def _settings(comparison: Comparison) -> tuple[tuple[str, str], ...]:
    own = {
        arm.name: {"learning_rate": arm.learning_rate, **arm.overrides} if arm.learning_rate else dict(arm.overrides)
        for arm in comparison.arms
    }
    return (("Shared by all arms", _yaml(comparison.settings)), ("What each arm changes", _yaml(own)))


def _yaml(values: object) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
