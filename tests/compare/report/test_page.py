"""The page holds all it shows and fetches nothing; Markdown says the same; a browser shows it without overflow."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import escape

from nybble.compare.report.content import content
from nybble.compare.report.markdown import markdown_report
from nybble.compare.report.page import html_report
from nybble.compare.report.write import write_report
from nybble.compare.result import Advice, Comparison, HeldOutRows, Sample, Score, read_comparison
from tests.compare.report.sample import comparison

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ENDS = {"base": 2.83, "lora": 1.554, "qlora": 1.592, "qlora calibrated, r=64": 1.558, "full": 1.549}
VOID = {"meta", "br", "hr", "img", "input", "link"}


def unfinished() -> Comparison:
    """One arm failed, one was not begun, and nothing is to be compared."""
    found = comparison({"base": 2.8, "lora": 1.55, "qlora": 1.59})
    base, lora, qlora = found.arms
    failed = replace(lora.runs[0], status="failed", error="CUDA | out of <memory>", loss=None, loss_before=None)
    arms = (base, replace(lora, status="failed", error="no run", runs=(failed,)), replace(qlora, runs=(), sweep=()))
    return replace(found, arms=arms, differences=(), samples=(), command=None, common_loss=None)


def every() -> dict[str, Comparison]:
    return {
        "device": comparison(ENDS),
        "host": comparison(ENDS, seeds=(0,), device=False),
        "unfinished": unfinished(),
        "one arm": comparison({"lora": 1.5}),
    }


class Elements(HTMLParser):
    """Checks that elements are closed in order; collects attributes and ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", list(every()))
def test_elements_are_closed_and_nothing_is_fetched(name: str) -> None:
    text = html_report(every()[name])
    page = Elements(text)
    assert not page.open
    assert not [name for name, _ in page.attributes if name in ("src", "href", "srcset")]
    assert all(found.startswith("#") for found in re.findall(r"url\(([^)]*)\)", text))
    assert not re.search(r"<(script|link|img|iframe)|@import", text)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]*)\)", text))
    assert used <= set(ids)


def test_one_answer_has_no_interval() -> None:
    found = comparison({"lora": 1.5})
    score = Score.over_questions("ROUGE-L", [0.5])
    text = markdown_report(replace(found, arms=(replace(found.arms[0], scores=(score,)),)))
    assert "**Answers to 1 test row, from 0 to 1**" in text
    assert "| lora | 0.500 |\n" in text


def test_the_verdict_is_the_one_that_the_comparison_holds() -> None:
    advice = Advice("qlora", "Choose qlora.", "It was said so.", ("One point.",), ("One caution.",))
    found = replace(comparison(ENDS), verdict=advice)
    for text in (html_report(found), markdown_report(found)):
        for part in ("Choose qlora.", "It was said so.", "One point.", "One caution."):
            assert part in text


@pytest.mark.parametrize("name", list(every()))
def test_page_and_markdown_say_the_same(name: str) -> None:
    found = every()[name]
    said, page, markdown = content(found), unescape(html_report(found)), markdown_report(found)
    tables = [said.overview, *(table for section in said.sections for table in section.tables)]
    texts = [said.title, said.subtitle, said.verdict.headline, said.verdict.because]
    texts += [*said.verdict.points, *said.verdict.cautions, *said.rerun]
    texts += [text.strip() for _, text in said.settings]
    for table in tables:
        texts += [table.title]
        for row in table.rows:
            assert len(row) == len(table.columns)
            assert "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" in markdown
            assert all(f">{cell}<" in page for cell in row)
    for sample in found.samples:
        texts += [sample.prompt, sample.expected, *sample.answers.values()]
    for text in texts:
        assert text in page
        assert text in markdown


def test_below_pictures_of_curves_stand_their_figures_folded_together() -> None:
    text = html_report(comparison(ENDS))
    section = text[text.index('<section id="curves">') : text.index('<section id="memory">')]
    pictures, *folded = section.split("<details>")
    assert len(re.findall('aria-label="[^"]*; figures of a few steps stand below"', pictures)) == 4
    assert [panel.count("<table") for panel in folded] == [3]


def test_values_of_others_are_escaped() -> None:
    bad = "<script>alert('&')</script>"
    found = replace(comparison(ENDS), title=bad, samples=(Sample(bad, bad, {"lora": bad}),), command=bad)
    text = html_report(found)
    assert bad not in text
    assert str(escape(bad)) in text


def test_a_sample_with_a_fence_stays_within_its_own() -> None:
    sample = Sample("a", "```python\nx\n```", {})
    assert "````\n```python\nx\n```\n````" in markdown_report(replace(comparison(ENDS), samples=(sample,)))


def test_a_failed_run_is_listed() -> None:
    text = markdown_report(unfinished())
    assert "failed: CUDA \\| out of <memory>" in text
    assert "lora failed: no run." in text


def test_the_report_is_two_files_of_which_the_page_is_returned(tmp_path: Path) -> None:
    page = write_report(comparison(ENDS), tmp_path)
    assert page.name == "report.html"
    assert {file.name for file in tmp_path.iterdir()} == {"report.html", "report.md"}
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_scores_stand_at_a_glance_with_their_intervals_and_by_seed() -> None:
    said = content(comparison(ENDS))
    assert said.overview.columns[3:5] == ("exact match", "ROUGE-L")
    lora, quality = said.overview.rows[1], next(section for section in said.sections if section.key == "quality")
    answers = quality.tables[-1]
    assert answers.title == "Answers to 32 test rows, from 0 to 1, with 95% intervals"
    assert answers.rows[1][1].startswith(f"{lora[3]} [0.")
    assert answers.rows[1][3] == "t interval over 5 seeds"
    runs = said.sections[-1].tables[0]
    assert {"exact match", "ROUGE-L"} < set(runs.columns)
    texts = replace(comparison(ENDS), arms=tuple(replace(arm, scores=()) for arm in comparison(ENDS).arms))
    assert "exact match" not in markdown_report(texts)


def test_how_rows_were_used_is_said() -> None:
    found = comparison(ENDS)
    for validation, said in (
        (found.validation, "30 validation rows (valid.jsonl) chose learning rates"),
        (found.test, "(test.jsonl), which chose checkpoints too."),
        (HeldOutRows("none", ()), "(test.jsonl), by which nothing was chosen."),
    ):
        assert said in markdown_report(replace(found, validation=validation))


def test_what_was_read_back_gives_the_same_report(tmp_path: Path) -> None:
    found = comparison(ENDS)
    assert html_report(read_comparison(found.write(tmp_path))) == html_report(found)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("name", ["device", "host"])
def test_a_browser_shows_it_without_overflow(tmp_path: Path, name: str, width: int) -> None:
    # A window may not be so narrow, a frame may.
    inside = escape(html_report(every()[name]))
    outside = f"""<iframe style="width: {width}px; height: 20000px; border: 0" srcdoc="{inside}">
    </iframe><script>document.querySelector("iframe").onload = ({{ target }}) => {{
        const page = target.contentDocument, all = [...page.querySelectorAll("body *")];
        const wide = all.filter(e => e.getBoundingClientRect().right > {width} + 1 && !e.closest(".wide"));
        document.body.dataset.found = [page.documentElement.scrollWidth, all.length, wide[0]?.outerHTML].join(" ");
    }};</script>"""
    page = tmp_path / "page.html"
    page.write_text(outside, encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    found = re.search(r'data-found="(\d+) (\d+) ([^"]*)"', shown)
    assert found
    assert int(found[2]) > 200
    assert (int(found[1]), found[3]) == (width, "")
