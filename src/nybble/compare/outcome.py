"""What a run that has just been trained leaves to its comparison, from its record and its log."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

from nybble.compare.folder import Trained
from nybble.compare.result import Curve, PhaseMemory
from nybble.train.loop import StepResult
from nybble.train.predicted import steady_speed
from nybble.train.record import logged_steps
from nybble.train.run import RunResult


def trained(result: RunResult, memory: Iterable[PhaseMemory], energy: tuple[float | None, float | None]) -> Trained:
    """energy: joules, and the seconds in which they were used."""
    summary = result.summary
    steps, best = logged_steps(result.output), summary["best_evaluation"]
    joules, seconds = energy
    return Trained(
        storage=summary["storage"],
        trainable=result.parameters.trainable,
        total=result.parameters.total,
        weight_bytes=summary["base"]["weight_bytes"],
        disk_bytes=sum(file.stat().st_size for file in result.folder.rglob("*.safetensors")),
        train_rows=summary["data"]["rows"],
        train_tokens=summary["data"]["tokens"],
        result=result.folder.name,
        validation_loss=best["loss"] if best else None,
        curve=_curve(steps, summary["evaluations"]),
        steps=summary["steps"],
        tokens=summary["tokens"],
        seconds=summary["seconds"],
        tokens_per_second=steady_speed(steps) or summary["tokens_per_second"],
        energy_joules=joules,
        energy_seconds=seconds,
        memory=tuple(memory),
        predicted_bytes=_predicted(summary["memory"]["predicted"]),
    )


def _predicted(solution: dict[str, Any] | None) -> dict[str, dict[str, int]] | None:
    """By phase, what holds how many bytes of the device; None where nothing was predicted."""
    if solution is None:
        return None
    return {name: phase["device"] for name, phase in solution["prediction"]["phases"].items()}


def _curve(steps: Sequence[StepResult], evaluations: Sequence[dict[str, Any]]) -> Curve:
    return Curve(
        steps=tuple(step.step for step in steps),
        losses=tuple(step.loss for step in steps),
        tokens=tuple(accumulate(step.tokens for step in steps)),
        seconds=tuple(accumulate(step.seconds for step in steps)),
        validation_steps=tuple(evaluation["step"] for evaluation in evaluations),
        validation_losses=tuple(evaluation["loss"] for evaluation in evaluations),
    )
