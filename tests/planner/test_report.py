"""What is shown of a plan, and what is advised."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from rich.console import Console

from nybble.plan import LayerPolicy, MemoryPlan
from nybble.planner.advice import Advice, Method, Option, advise
from nybble.planner.cards import card
from nybble.planner.overview import Overview
from nybble.planner.report import Report
from nybble.planner.run_shape import RunShape
from nybble.planner.shapes import ModelShape
from nybble.planner.solve import Change, Solution
from nybble.planner.words import describe, duration, fit_lines, in_brief, in_one_line, significant
from tests.planner.predictions import GIB, MIXED, STEP, prediction
from tests.tiny import random_model

RUN = RunShape(accumulation=16)
LEANEST = MemoryPlan.uniform(2, "offload", "streamed")
FITS = Solution(RUN, prediction(), 24 * GIB, 64 * GIB, True, LEANEST)
FAILS = Solution(RUN, prediction(), 12 * GIB, 64 * GIB, False, LEANEST)


def shown(report: object, width: int = 80) -> str:
    console = Console(width=width, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(report)
    return capture.get()


def report(solution: Solution, advice: Advice | None = None, split: Solution | None = None) -> Report:
    return Report("some/model", 1000, 9_251_000, card("4090"), solution, advice, split)


def test_plans_in_words() -> None:
    assert describe(MemoryPlan.uniform(3)) == {"activations": "kept", "weights": "on the device"}
    assert describe(MIXED) == {
        "activations": "kept in 20, recomputed in 12 of 32 layers",
        "weights": "on the device in 20, streamed from host memory in 12 of 32 layers; the device holds 2 of those",
        "embedding": "in host memory",
        "moments": "paged: in host memory while the device needs the room",
    }
    assert in_brief(MIXED) == "20 kept, 12 recomputed; 12 streamed; embedding on host; paged"
    assert in_brief(MemoryPlan.uniform(3)) == "kept"
    lean = MemoryPlan((LayerPolicy("offload", "disk"),) * 4, span=2, mlp_rows=4096, embedding="host", head="host")
    assert describe(lean)["activations"] == ("recomputed from host memory, 2 layers at a time, the MLP by 4,096 tokens")
    assert describe(lean)["weights"] == "streamed from disk; the device holds 4 of those"
    assert in_one_line(lean).endswith("; embedding and head in host memory")


def test_figures_have_the_digits_that_a_prediction_has() -> None:
    assert [significant(value) for value in (15912.3, 1234567, 99.6, 12, 3.14159)] == [
        "15,900",
        "1,230,000",
        "100",
        "12",
        "3.1",
    ]
    assert [duration(seconds) for seconds in (0.0234, 0.523, 12.34, 125)] == ["23 ms", "0.52 s", "12.3 s", "2:05"]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_report_says_what_matters_at_any_width(width: int) -> None:
    faster = prediction(STEP | {"activations": 30.0}, MemoryPlan.uniform(32), seconds=1.0)
    text = shown(report(replace(FITS, faster=faster)), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= min(width, 110)
    flat = " ".join(text.split())
    for part in (
        "some/model, QLoRA on RTX 4090 with 24.00 GiB",
        "1,000 of 9,251,000 parameters train, 1 in 9,251",
        "16 x 1 x 2,048 tokens a step",
        "It fits: 19.88 GiB of 24.00 GiB, and 3.10 GiB of host memory. 16,400 tokens/s.",
        "kept in 20, recomputed in 12 of 32 layers",
        "A step takes 2.00 s, bound by compute: 1.80 s of kernels, 0.40 s of copies beside them.",
        "The next faster plan needs 37.48 GiB, 32,800 tokens/s: activations kept; weights on the device",
    ):
        assert part in flat, part


def test_each_bar_begins_where_the_one_above_ends() -> None:
    lines = shown(report(FITS)).splitlines()
    start = next(number for number, line in enumerate(lines) if "at the peak of an optimizer step" in line) + 1
    bars = [line[24:] for line in lines[start : start + 8]]
    names = [line.split()[0] for line in lines[start : start + 8]]
    # What is below 1 % comes together.
    assert names == ["context", "weights", "moments", "activations", "loss", "fragmentation", "others", "free"]
    ends = [len(bar.rstrip()) for bar in bars]
    begins = [len(bar) - len(bar.lstrip()) for bar in bars]
    assert ends == sorted(ends)
    assert all(abs(begin - end) <= 1 for begin, end in zip(begins[1:], ends, strict=False))
    assert set(bars[-1].strip()) == {"·"}


def test_what_does_not_fit_says_what_would() -> None:
    change = Change("optim.state_bits: 8", prediction(STEP | {"activations": 3.0}, seconds=4))
    text = " ".join(shown(report(replace(FAILS, change=change))).split())
    assert "It does not fit: 19.88 GiB of 12.00 GiB, and 3.10 GiB of 64.00 GiB of host memory" in text
    assert "The smallest change that fits: optim.state_bits: 8 (10.48 GiB, 8,190 tokens/s)" in text
    assert "beyond 7.88" in text
    assert fit_lines(replace(FAILS, change=change)) == [
        "an optimizer step would need 19.88 GiB, and there are 12.00 GiB",
        "The smallest change that fits: optim.state_bits: 8 (10.48 GiB, 8,190 tokens/s)",
    ]
    assert fit_lines(replace(FAILS, budget_bytes=24 * GIB, host_bytes=2 * GIB)) == [
        "the run would need 3.10 GiB of host memory, and there are 2.00 GiB",
        "No change of settings fits there: give it more, or take a smaller model.",
    ]
    assert fit_lines(FITS) == [
        "predicted: 19.88 GiB of 24.00 GiB at the peak, in an optimizer step, 3.10 GiB of host memory; 16,400 tokens/s"
    ]


SHAPE = ModelShape.from_config(random_model("llama").config.to_dict())


def solution(seconds: float, fits: bool = True, memory: float = 5.31) -> Solution:
    return Solution(RUN, prediction(STEP | {"weights": memory}, seconds=seconds), 24 * GIB, 64 * GIB, fits, LEANEST)


@pytest.mark.parametrize(
    ("lora", "qlora", "method", "why"),
    [
        (
            solution(2.0),
            solution(2.0),
            "lora",
            "its 16-bit weights, streamed from the host, lose nothing to quantization and are as fast here",
        ),
        (solution(2.1), solution(2.0), "lora", "QLoRA would be only 5% faster"),
        (solution(4.0), solution(2.0), "qlora", "2.0x as fast"),
        (solution(1.0, fits=False), solution(2.0), "qlora", "do not fit"),
        (solution(1.0, fits=False), solution(2.0, fits=False), "qlora", "neither fits"),
    ],
)
def test_lora_unless_memory_binds(lora: Solution, qlora: Solution, method: Method, why: str) -> None:
    advice = advise({"lora": lora, "qlora": qlora}.__getitem__, SHAPE, card("4090"))
    assert advice.method == method
    assert why in advice.why
    for option in advice.options.values():
        assert option.least.peak_bytes < option.fastest.peak_bytes
        assert option.least.plan == LEANEST
        assert option.fastest.plan == MemoryPlan.uniform(2)
    text = shown(report(FITS, advice))
    assert f"Take {'LoRA' if method == 'lora' else 'QLoRA'}: " in text
    assert text.count("does not fit") == [lora.fits, qlora.fits].count(False)


def test_micro_batches_that_make_a_run_fit_are_said_once() -> None:
    split = replace(FITS, run=replace(RUN, batch=2, accumulation=8))
    settings = "train.batch_size=2 train.gradient_accumulation=8"
    text = " ".join(shown(report(replace(FAILS, change=Change(settings, prediction())), split=split)).split())
    assert text.count(settings) == 1
    assert f"The same step in other micro-batches: 19.88 GiB, 16,400 tokens/s with {settings}" in " ".join(
        shown(report(FITS, split=split)).split()
    )


def test_the_figures_are_json() -> None:
    option = Option(FITS, prediction(), prediction())
    advice = Advice({"lora": option, "qlora": option}, "lora", "so")
    figures = json.loads(json.dumps(report(FITS, advice, FITS).figures()))
    assert figures["prediction"]["peak_bytes"] == FITS.prediction.peak_bytes
    assert figures["prediction"]["phases"]["step"]["device"]["weights"] == int(5.31 * GIB)
    assert figures["prediction"]["plan"]["layers"] == [
        {"number": 20, "activations": "keep", "weights": "resident"},
        {"number": 12, "activations": "recompute", "weights": "streamed"},
    ]
    assert figures["advice"]["method"] == "lora"
    assert figures["split"]["batch_size"] == 1


def test_cards_side_by_side() -> None:
    overview = Overview("some/model", [(card("4090"), FITS), (card("rtx 4070"), FAILS)])
    lines = shown(overview).splitlines()
    assert lines[2].split()[:8] == ["RTX", "4090", "23.50", "GiB", "19.88", "GiB", "16,400", "20"]
    assert lines[-1].split() == ["RTX", "4070", "11.60", "GiB", "19.88", "GiB", "-", "does", "not", "fit"]
    assert max(map(len, lines)) <= 80
    assert json.loads(json.dumps(overview.figures()))["cards"]["RTX 4070"]["fits"] is False
