"""The learning rate of each optimizer step, a pure function."""

from __future__ import annotations

import math

from nybble.optim.config import OptimConfig


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """The rate of update number `step`, counted from 1 to total_steps.

    It rises along a line, reaches its full value at the step after the warm-up, then stays (constant) or falls along a
    line or half a cosine, towards the min_lr_ratio that a step after the last would have: no step is spent on a rate
    of zero.
    """
    warmup = warmup_steps(total_steps, config)
    if step <= warmup:
        return config.learning_rate * step / (warmup + 1)
    progress = (step - warmup - 1) / max(1, total_steps - warmup)
    floor = config.min_lr_ratio
    return config.learning_rate * (floor + (1 - floor) * _left(config.schedule, progress))


def warmup_steps(total_steps: int, config: OptimConfig) -> int:
    """Steps of warm-up; a ratio rounds up, so that any warm-up at all has a step."""
    if config.warmup_steps is not None:
        return min(config.warmup_steps, total_steps)
    return min(math.ceil(config.warmup_ratio * total_steps), total_steps)


def _left(schedule: str, progress: float) -> float:
    """Share of the way down that is left after `progress` (0 to 1) of the steps."""
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))
