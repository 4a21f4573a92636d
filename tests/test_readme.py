"""The READMEs show what the kept results say."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import typer

from nybble.cli import app

ROOT = Path(__file__).parents[1]
COMMANDS: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]
READMES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md"]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return runpy.run_path(str(ROOT / "benchmarks" / "report.py"))


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_tables_are_those_of_the_kept_results(report: dict[str, Any], readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    assert report["updated"](text) == text


def test_every_table_has_a_place(report: dict[str, Any]) -> None:
    text = "".join(readme.read_text(encoding="utf-8") for readme in READMES)
    assert not [name for name in report["tables"]() if f"<!-- {name} -->" not in text]


def test_a_table_without_results_says_so(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(report["read"].__globals__, "RESULTS", tmp_path)
    assert set(report["tables"]().values()) == {report["NOT_MEASURED"]}


def test_speeds_stand_beside_those_of_the_fastest_peer(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {("peft", "qlora bf16 1 2048 keep"): 3000, ("nybble", "qlora bf16 1 2048 keep"): 12000}
    speeds |= {("unsloth", "qlora bf16 1 2048 keep"): 8000, ("nybble", "qlora fp8 1 2048 keep"): 16000}
    others = {"peak_reserved_gib": 8, "resident_gib": 5, "load_seconds": 9, "step_seconds": [1, 2], "device": "H100"}
    others |= {"loss": [12.5, 12.25], "grad_norm": [1.0, 2.0], "peak_allocated_gib": 7.25}
    rows = [
        {"stack": stack, "row": row, "tokens_per_second": speed, **others} for (stack, row), speed in speeds.items()
    ]
    figures = {**others, "tokens_per_second": 9000, "row": "qlora bf16 4 2048 keep"}
    rows += [{**figures, "stack": "nybble"}, {**figures, "stack": "peft", "device": "H200"}]  # shown, not compared
    result = {"device": "H100", "versions": {"torch": "2.11.0"}, "date": "2026-11-24", "rows": rows}
    (tmp_path / "step_8b.json").write_text(json.dumps(result))
    monkeypatch.setitem(report["read"].__globals__, "RESULTS", tmp_path)
    assert report["tables"]()["step_8b"] == (
        "| method, sequences, activations | nybble | Unsloth | PEFT | to the fastest peer |\n"
        "|---|---|---|---|---|\n"
        "| QLoRA, 4 x 2048, kept | 9,000 tok/s, 7.2 GiB | - | 9,000 tok/s, 7.2 GiB | - |\n"
        "| QLoRA, 1 x 2048, kept | 12,000 tok/s, 7.2 GiB | 8,000 tok/s, 7.2 GiB | 3,000 tok/s, 7.2 GiB | 1.50x |\n"
        "| QLoRA fp8, 1 x 2048, kept | 16,000 tok/s, 7.2 GiB | - | - | - |\n"
        "\nH100 and H200, torch 2.11.0, 2026-11-24.\n"
    )
    details = report["tables"]()["step_8b_details"].splitlines()
    assert [line.split(" | ")[1] for line in details[4:8]] == ["nybble", "Unsloth", "PEFT", "nybble"]
    assert details[4].endswith("| 12,000 | 1.000 to 2.000 | 7.2, 8.0, 5.0 | 9 | 12.500 -> 12.250 | 1.00 -> 2.00 |")


def test_kernels_are_those_of_a_step_in_its_order(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = [*report["KERNELS"], ("norm", "8192 x 576")]
    rows = [
        {"kernel": kernel, "shape": shape, "device_us": 10.25 + place, "gb_per_s": 2000.4, "share_of_copy": 0.755}
        for place, (kernel, shape) in enumerate(shown)
    ]
    result = {"device": "H200", "versions": {"torch": "2.11.0"}, "date": "2026-11-29", "rows": rows[::-1]}
    (tmp_path / "kernels.json").write_text(json.dumps(result))
    monkeypatch.setitem(report["read"].__globals__, "RESULTS", tmp_path)
    lines = report["tables"]()["kernels"].splitlines()
    assert [tuple(line.split(" | ")[:2]) for line in lines[2:-2]] == [(f"| {k}", shape) for k, shape in shown[:-1]]
    assert lines[2] == "| add_norm, r 16 | 8192 x 4096 | 10.2 | 2,000 | 76% |"


def test_rows_measured_in_parts_are_shown_together_until_all_are_measured_at_once(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keep(file: str, date: str, *works: str) -> None:
        rows = [{"row": work, "error": "out of memory"} for work in works]
        kept = {"device": "H200", "versions": {"torch": "2.11.0"}, "date": date, "rows": rows}
        (tmp_path / f"{file}.json").write_text(json.dumps(kept))

    monkeypatch.setitem(report["read"].__globals__, "RESULTS", tmp_path)
    keep("memory_steps_70b", "2026-11-28", "70b 1x512")
    keep("memory_steps_8b", "2026-11-29", "8b 1x512", "8b 2x512")
    in_parts = report["tables"]()["memory_steps"].splitlines()
    assert [line.split(",")[0] for line in in_parts[2:5]] == ["| 70B QLoRA", "| 8B QLoRA", "| 8B QLoRA"]
    assert in_parts[6:] == [f"H200, torch 2.11.0, 2026-11-{day}." for day in (28, 29)]
    keep("memory_steps", "2026-11-30", "8b 1x512")
    assert report["tables"]()["memory_steps"].splitlines()[3:] == ["", "H200, torch 2.11.0, 2026-11-30."]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").rglob("*.*")), ids=lambda path: path.name)
def test_kept_results_name_no_folder_of_one_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not [folder for folder in ("/tmp/", "/root/", "/home/", "/work/", "Traceback") if folder in text]


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_every_file_that_it_names_is_there(readme: Path) -> None:
    links = [part.split(")")[0] for part in readme.read_text(encoding="utf-8").split("](")[1:]]
    assert not [link for link in links if not link.startswith("http") and not (readme.parent / link).exists()]


@pytest.mark.parametrize(
    "page", [*READMES, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_commands_have_the_options_that_it_gives_them(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"`nybble ([^`]+)`", text)
    for block in re.findall(r"^```.*?^```", text, flags=re.DOTALL | re.MULTILINE):
        commands += re.findall(r"^(?:\$ |\s*)nybble ([^#\n]+)", block, flags=re.MULTILINE)
    options = {verb: {name for p in command.params for name in p.opts} for verb, command in COMMANDS.items()}
    for verb, *words in map(str.split, commands):
        assert {word for word in words if word.startswith("-")} <= options[verb], f"nybble {verb}"
