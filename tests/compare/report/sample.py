"""Comparisons as values, made by a seed: five seeds of four arms on a device, and a short one on a CPU."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from nybble.compare.result import (
    ArmResult,
    Comparison,
    Curve,
    Difference,
    HeldOutRows,
    Interval,
    Machine,
    MergeResult,
    PhaseMemory,
    Sample,
    Score,
    SeedResult,
    Statement,
    Sweep,
    Verdict,
)

MIB = 2**20
MARGIN = 0.01
SEEDS = (0, 1, 2, 3, 4)

_STATED = "2026-11-29T19:02:11Z"
_PREDICTED = {
    "load": {"weights": 90 * MIB, "scratch": 60 * MIB},
    "step": {
        "weights": 90 * MIB,
        "adapters": 19 * MIB,
        "moments": 38 * MIB,
        "activations": 900 * MIB,
        "logits": 60 * MIB,
    },
}


def curve(rng: random.Random, end: float, steps: int, every: int) -> Curve:
    numbers = range(1, steps + 1)

    def fall(step: int) -> float:
        return end + 1.6 * math.exp(-6 * step / steps)

    evaluated = range(0, steps + 1, every)
    return Curve(
        steps=tuple(numbers),
        losses=tuple(fall(step) + rng.gauss(0, 0.12) for step in numbers),
        tokens=tuple(8192 * step for step in numbers),
        seconds=tuple(0.03 * step for step in numbers),
        validation_steps=tuple(evaluated),
        validation_losses=tuple(fall(step) + rng.gauss(0, 0.004) for step in evaluated),
    )


def run(rng: random.Random, arm: str, seed: int, end: float, *, device: bool = True, steps: int = 150) -> SeedResult:
    loss, trained = end + rng.gauss(0, 0.002), arm != "base"
    on_device = (lambda mib: mib * MIB) if device else (lambda _: None)
    speed = {"qlora": 360_000.0, "full": 210_000.0}.get(arm, 372_000.0) * rng.uniform(0.985, 1.015)
    return SeedResult(
        seed=seed,
        folder=f"{arm}/seed-{seed}",
        status="finished",
        loss_before=(end if arm == "base" else end + 1.3) + (0.3 if arm == "qlora" else 0.0),
        loss=loss,
        curve=curve(rng, loss, steps, max(1, steps // 10) if device else steps) if trained else Curve(),
        steps=steps if trained else 0,
        tokens=8192 * steps if trained else 0,
        seconds=8192 * steps / speed if trained else 0.0,
        tokens_per_second=(speed if device else speed / 1000) if trained else None,
        seconds_to_loss=rng.uniform(2.2, 2.6) if trained and device else None,
        energy_joules=rng.uniform(2100, 2500) if trained and device else None,
        energy_seconds=6.1 if trained and device else None,
        memory=(
            PhaseMemory("load", 900 * MIB, on_device(160 if arm == "qlora" else 270)),
            *(
                (PhaseMemory("train", 1300 * MIB, on_device({"qlora": 1120, "full": 2900}.get(arm, 1310))),)
                if trained
                else ()
            ),
            PhaseMemory("evaluate", 1250 * MIB, on_device(420)),
        ),
        scores={"exact match": (right := rng.uniform(0.3, 0.5)), "ROUGE-L": right + 0.2},
    )


def arm(rng: random.Random, name: str, end: float, *, seeds: tuple[int, ...] = SEEDS, device: bool = True) -> ArmResult:
    trained = name != "base"
    rates = (0.0005, 0.001, 0.002, 0.004)
    sweep = tuple(Sweep(rate, 0, end + 0.02 * abs(math.log2(rate / 0.002))) for rate in rates)
    runs = tuple(run(rng, name, seed, end, device=device) for seed in (seeds if trained else seeds[:1]))
    return ArmResult(
        name=name,
        status="finished",
        method="qlora" if "qlora" in name else "full" if name == "full" else "lora",
        storage="nf4" if "qlora" in name else "bf16",
        overrides={"method": name, "lora.r": 16},
        config={"method": name},
        learning_rate=0.002 if trained else None,
        loss_interval=Interval(end - 0.002, end + 0.002, 0.95, "t interval over 5 seeds"),
        trainable={"base": 0, "full": 134_515_008}.get(name, 4_884_480),
        total=139_400_000,
        disk_bytes=19 * MIB,
        weight_bytes=257 * MIB,
        runs=runs,
        scores=tuple(score(key, [(one.scores or {})[key] for one in runs]) for key in ("exact match", "ROUGE-L")),
        sweep=sweep if trained and device else (),
        merges=(MergeResult("original", end, end + 0.0003, 0.21), MergeResult("dequantized", end, end + 0.17, 12.5))
        if "lora" in name and device
        else (),
        predicted_bytes=_PREDICTED if trained and device else None,
    )


def by_rows(arm: ArmResult, tokens: Sequence[int]) -> ArmResult:
    """With the loss of every test row, all of them the same a token."""
    runs = (replace(one, sequence_losses=tuple((one.loss or 0.0) * count for count in tokens)) for one in arm.runs)
    return replace(arm, runs=tuple(runs))


def score(name: str, by_seed: Sequence[float]) -> Score:
    value, how = (
        fmean(by_seed),
        f"t interval over {len(by_seed)} seeds" if len(by_seed) > 1 else "bootstrap over 32 rows",
    )
    return Score(name, value, Interval(value - 0.04, value + 0.04, 0.95, how), 32)


def difference(arm: ArmResult, reference: ArmResult, verdict: Verdict | None = None) -> Difference:
    by_seed = tuple(
        (own.loss or 0) - (other.loss or 0) for own, other in zip(arm.finished, reference.finished, strict=False)
    )
    mean = fmean(by_seed)
    interval = Interval(mean - 0.003, mean + 0.003, 0.95, f"t interval over {len(by_seed)} seeds")
    judged: Verdict = "better" if interval.high < 0 else "not worse" if interval.high < MARGIN else "inconclusive"
    if interval.low > MARGIN:
        judged = "worse"
    rows = Interval(mean - 0.004, mean + 0.004, 0.95, "bootstrap over 60 test rows")
    seeds = tuple(own.seed for own in arm.finished)
    return Difference(arm.name, reference.name, seeds, mean, by_seed, interval, rows, MARGIN, verdict or judged)


def comparison(
    ends: Mapping[str, float], *, seeds: tuple[int, ...] = SEEDS, device: bool = True, seed: int = 0
) -> Comparison:
    """Arms by the loss that each ends with; "lora" is the reference."""
    rng = random.Random(seed)
    made = [arm(rng, name, end, seeds=seeds, device=device) for name, end in ends.items()]
    tokens = tuple(rng.randrange(40, 400) for _ in range(60))
    arms = tuple(by_rows(one, tokens) for one in made)
    reference = next(one for one in arms if one.name == "lora")
    answer = "Return the source of the object.\n\nRaises OSError <b>if</b> it has none."
    return Comparison(
        format=1,
        output="runs/compare",
        title="SmolLM2-135M-Instruct on Python's library: LoRA, QLoRA and full fine-tuning",
        command="nybble compare study.yaml --arms base,lora,qlora,full --seeds 5 --output runs/compare",
        settings={
            "model": {"name": "SmolLM2-135M-Instruct"},
            "data": {"path": "library", "max_length": 512},
            "train": {"max_steps": 150, "batch_size": 16},
        },
        statement=Statement("lora", MARGIN, 0.95, seeds, (0.0005, 0.001, 0.002, 0.004) if device else (), _STATED),
        machine=Machine(
            device="cuda" if device else "cpu",
            name="NVIDIA H100 80GB HBM3" if device else "x86_64",
            memory_bytes=80 * 1024 * MIB,
            cores=16,
            versions={"torch": "2.13.0", "triton": "3.7.0", "transformers": "5.24.0", "nybble": "0.1.0"},
        ),
        train_rows=2866,
        train_tokens=612_331,
        validation=HeldOutRows("valid.jsonl", tokens[:30]),
        test=HeldOutRows("test.jsonl", tokens),
        arms=arms,
        differences=tuple(
            difference(one, reference) for one in arms if one.trainable and one.finished and one is not reference
        ),
        samples=tuple(
            Sample(
                f"What does Python's inspect.getsource{n} do?",
                answer,
                {one.name: f"{one.name}: {answer}" for one in arms},
            )
            for n in range(2)
        ),
        common_loss=1.62 if device else None,
        common_loss_of="validation" if device else None,
        seconds=431.0,
    )
