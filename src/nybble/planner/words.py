"""Plans and predictions in words, each a line at most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from nybble.plan import MemoryPlan
from nybble.planner.prediction import Prediction
from nybble.planner.solve import Solution
from nybble.units import format_bytes, format_seconds

_ACTIVATIONS = {
    "keep": "kept",
    "keep_matmuls": "kept but for norms",
    "keep_on_host": "kept on the host",
    "recompute": "recomputed",
    "offload": "recomputed from host memory",
}
_IN_BRIEF = _ACTIVATIONS | {"keep_matmuls": "kept but norms", "keep_on_host": "on host", "offload": "offloaded"}
_WEIGHTS = {"resident": "on the device", "streamed": "streamed from host memory", "disk": "streamed from disk"}
PHASES = {
    "load": "loading",
    "step": "an optimizer step",
    "evaluation": "evaluation",
    "save": "saving",
    "merge": "a merge",
}


def describe(plan: MemoryPlan) -> dict[str, str]:
    """What is held how: `{"activations": "kept", "weights": "on the device in 20, streamed in 12 layers"}`."""
    lines = {
        "activations": _shares([_ACTIVATIONS[layer.activations] for layer in plan.layers]) + _recomputing(plan),
        "weights": _shares([_WEIGHTS[layer.weights] for layer in plan.layers]),
    }
    if plan.streamed():
        lines["weights"] += f"; the device holds {plan.stream_slots * plan.span} of those"
    ends = [name for name in ("embedding", "head") if getattr(plan, name) == "host"]
    if ends:
        lines[" and ".join(ends)] = "in host memory"
    if plan.moments == "paged":
        lines["moments"] = "paged: in host memory while the device needs the room"
    return lines


def in_one_line(plan: MemoryPlan) -> str:
    """`activations kept, weights on the device`."""
    return "; ".join(f"{name} {how}" for name, how in describe(plan).items())


def in_brief(plan: MemoryPlan) -> str:
    """`20 kept, 12 recomputed; 12 streamed; embedding on host`."""
    parts = [_counted([_IN_BRIEF[layer.activations] for layer in plan.layers])]
    held = Counter(layer.weights for layer in plan.layers if layer.weights != "resident")
    for weights, count in held.items():
        words = {"streamed": "streamed", "disk": "from disk"}[weights]
        parts.append(words if count == len(plan.layers) else f"{count} {words}")
    ends = [name for name in ("embedding", "head") if getattr(plan, name) == "host"]
    parts += [f"{', '.join(ends)} on host"] if ends else []
    return "; ".join([*parts, *(["paged"] if plan.moments == "paged" else [])])


def figures(prediction: Prediction) -> str:
    """`22.91 GiB, 15,900 tokens/s`."""
    return f"{format_bytes(prediction.peak_bytes)}, {speed(prediction)}"


def speed(prediction: Prediction) -> str:
    return f"{significant(prediction.tokens_per_second)} tokens/s"


def significant(value: float) -> str:
    """Three digits, as a prediction is no better: `15,912` -> `15,900`."""
    digits = 3 - len(str(int(value)))
    return f"{round(value, min(digits, 0)):,.0f}" if value >= 10 else f"{value:.2g}"


def duration(seconds: float) -> str:
    """`0.52 s`, `23 ms`, `2:05`."""
    if seconds >= 10:
        return format_seconds(seconds)
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.0f} ms"


def fit_lines(solution: Solution) -> list[str]:
    """Whether it fits, and what then, or what would."""
    prediction, budget = solution.prediction, format_bytes(solution.budget_bytes)
    peak, phase = format_bytes(prediction.peak_bytes), PHASES.get(prediction.peak_phase, prediction.peak_phase)
    if solution.fits:
        host = f", {format_bytes(prediction.host_bytes)} of host memory" if prediction.host_bytes else ""
        return [f"predicted: {peak} of {budget} at the peak, in {phase}{host}; {speed(prediction)}"]
    lines = []
    if prediction.peak_bytes > solution.budget_bytes or prediction.host_bytes <= solution.host_bytes:
        lines.append(f"{phase} would need {peak}, and there are {budget}")
    if prediction.host_bytes > solution.host_bytes:
        needed, there = format_bytes(prediction.host_bytes), format_bytes(solution.host_bytes)
        lines.append(f"the run would need {needed} of host memory, and there are {there}")
    if solution.change:
        lines.append(
            f"The smallest change that fits: {solution.change.settings} ({figures(solution.change.prediction)})"
        )
    else:
        lines.append("No change of settings fits there: give it more, or take a smaller model.")
    return lines


def _shares(words: Sequence[str]) -> str:
    counts = Counter(words)
    if len(counts) == 1:
        return words[0]
    parts = [f"{word} in {count}" for word, count in counts.items()]
    return f"{', '.join(parts)} of {len(words)} layers"


def _counted(words: Sequence[str]) -> str:
    counts = Counter(words)
    return words[0] if len(counts) == 1 else ", ".join(f"{count} {word}" for word, count in counts.items())


def _recomputing(plan: MemoryPlan) -> str:
    if all(layer.activations not in ("recompute", "offload") for layer in plan.layers):
        return ""
    together = f", {plan.span} layers at a time" if plan.span > 1 else ""
    rows = f", the MLP by {plan.mlp_rows:,} tokens" if plan.mlp_rows else ""
    return together + rows
