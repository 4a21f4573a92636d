"""What the study trains, laid down before its first run, and what it costs.

    PYTHONPATH=src:benchmarks python3 studies/grid.py        prints every part with its runs and its price

Each part is one comparison: arms on the same data, in the same order, with the same seeds. A learning rate is tried
with the first seed and chosen by validation rows; at the best one all seeds are trained, and test rows that chose
nothing give the results. An arm counts as not worse than LoRA if the 95 % interval of their paired difference ends
below `MARGIN`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

MARGIN = 0.010  # nats a target token
SEEDS = 5
ADAPTER_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
FULL_RATES = (5e-5, 1e-4, 2e-4, 4e-4)
BELOW, FULL_BELOW = 2.5e-4, 2.5e-5  # added after the first runs, where the lowest was the best
SEQ_LEN = 512
RANKS = (4, 8, 32, 64, 128)  # besides 16, which the parts on quality have

# SmolLM2-135M at 16 x 512 on an H200 (benchmarks/results/step_smollm2.json); the rest was estimated, not measured:
# preparing, recording the step's graph and evaluating; forking a process and loading a base; answering.
TOKENS_PER_SECOND = 370_000
RUN_S, ARM_S = 4.0, 10.0
ANSWERS_AT_ONCE, TOKEN_S = 16, 0.03  # answers are made in batches, a token of each at a time

Overrides = dict[str, Any]


@dataclass(frozen=True)
class Data:
    """kind: of rows. steps, batch_size: of a run, in sequences of `SEQ_LEN` tokens. *_rows: held out, at most.

    questions: test rows that every run of a result answers, in so many tokens at most, where the data have answers.
    """

    kind: str
    steps: int
    batch_size: int
    validation_rows: int = 200
    test_rows: int = 400
    questions: int = 0
    answer_tokens: int = 64


TEXT = Data("text", steps=150, batch_size=16)
DOCSTRINGS = Data("docstrings", steps=100, batch_size=8, questions=64)
WORDS = Data("words", steps=100, batch_size=8, questions=64, answer_tokens=32)


@dataclass(frozen=True)
class Part:
    """arms: by name, what each changes. seeds, rates: of adapters; the full arm's own rates are among its overrides.

    merge: whether the first adapter of each arm is merged, and what that costs measured.
    """

    name: str
    data: Data
    arms: dict[str, Overrides]
    r: int = 16
    targets: str | tuple[str, ...] = "all-linear"
    seeds: int = SEEDS
    rates: tuple[float, ...] = ADAPTER_RATES
    merge: bool = False

    @property
    def trained(self) -> int:
        """How many arms are."""
        return sum(settings["method"] != "base" for settings in self.arms.values())

    @property
    def runs(self) -> int:
        """Of training, one at each rate and one for every further seed at the best."""
        own = (arm.get("learning_rates", self.rates) for arm in self.arms.values() if arm["method"] != "base")
        return sum(len(rates) + self.seeds - 1 for rates in own)

    @property
    def seconds(self) -> float:
        """Of one GPU, estimated."""
        tokens = self.data.steps * self.data.batch_size * SEQ_LEN
        answering = math.ceil(self.data.questions / ANSWERS_AT_ONCE) * self.data.answer_tokens * TOKEN_S
        results = self.trained * self.seeds + len(self.arms) - self.trained
        return self.runs * (tokens / TOKENS_PER_SECOND + RUN_S) + results * answering + len(self.arms) * ARM_S


def grid(prepared: Callable[[str], str]) -> list[Part]:
    """All parts, the ones that the claims rest on first. prepared: the folder of the base for a kind of data."""
    text = adapters(prepared("text"))
    return [
        Part("quality-text", TEXT, text | other_starts() | full() | bases(prepared("text")), merge=True),
        answers(DOCSTRINGS, prepared("docstrings"), below=True),
        answers(WORDS, prepared("words")),
        *(Part(f"rank-{r}", TEXT, text, r=r) for r in RANKS),
        Part("targets-attention", TEXT, text, targets="attention"),
        Part("targets-q-v", TEXT, text, targets=("q_proj", "v_proj")),
    ]


def answers(data: Data, prepared: str, *, below: bool = False) -> Part:
    """The part of data with questions. below: whether rates go on below the first, where that turned out the best."""
    rates = (BELOW, *ADAPTER_RATES) if below else ADAPTER_RATES
    arms = adapters(prepared) | full(below=below) | bases(prepared)
    return Part(f"quality-{data.kind}", data, arms, rates=rates)


def full(*, below: bool = False) -> dict[str, Overrides]:
    """All weights trained."""
    return {"full": {"method": "full", "learning_rates": (FULL_BELOW, *FULL_RATES) if below else FULL_RATES}}


def adapters(prepared: str) -> dict[str, Overrides]:
    """LoRA, plain QLoRA, and QLoRA on the prepared base without and with its correction as the adapter's start."""
    on_prepared = {"method": "qlora", "model.name": prepared}
    return {
        "lora": {"method": "lora"},
        "qlora": {"method": "qlora"},
        "prepared": on_prepared,
        "calibrated": on_prepared | {"lora.init": "calibrated"},
    }


def other_starts() -> dict[str, Overrides]:
    """What QLoRA can do without a calibration."""
    return {
        "search": {"method": "qlora", "model.rounding": "search"},
        "pissa": {"method": "qlora", "lora.init": "pissa", "learning_rates": (BELOW, *ADAPTER_RATES)},
        "loftq": {"method": "qlora", "lora.init": "loftq"},
    }


def bases(prepared: str) -> dict[str, Overrides]:
    """Models as they are, before any training."""
    return {
        "base": {"method": "base"},
        "base-nf4": {"method": "base", "model.storage": "nf4"},
        "base-prepared": {"method": "base", "model.storage": "nf4", "model.name": prepared},
    }


def small(parts: list[Part]) -> list[Part]:
    """The same questions on a machine of two cores: fewer seeds, rates and steps, of what the claims rest on."""
    return [_small(part) for part in parts if part.name.startswith("quality")]


def _small(part: Part) -> Part:
    data = replace(part.data, steps=20, batch_size=2, validation_rows=32, test_rows=64)
    data = replace(data, questions=min(data.questions, 16))
    arms = {name: settings for name, settings in part.arms.items() if name not in ("full", *other_starts())}
    return replace(part, data=data, arms=arms, seeds=2, rates=(1e-3, 2e-3))


def priced(parts: list[Part]) -> Iterator[str]:
    """A line a part, and their sum."""
    yield f"{'part':<20}{'arms':>5}{'runs':>6}{'steps x tokens':>16}{'GPU seconds':>13}"
    for part in parts:
        shape = f"{part.data.steps} x {part.data.batch_size * SEQ_LEN}"
        yield f"{part.name:<20}{len(part.arms):>5}{part.runs:>6}{shape:>16}{part.seconds:>13.0f}"
    total = sum(part.seconds for part in parts)
    runs = sum(part.runs for part in parts)
    yield f"{'together':<20}{'':>5}{runs:>6}{'':>16}{total:>13.0f}   ({total / 4:.0f} s on 4 GPUs)"


if __name__ == "__main__":
    print("\n".join(priced(grid("runs/study/prepared/{}".format))))
