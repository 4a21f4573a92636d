"""Figures as the report writes them."""

from __future__ import annotations

from collections.abc import Sequence

from nybble.compare.result import ArmResult, Difference, Interval, Score
from nybble.units import format_bytes

NOTHING = "-"
# Two speeds or sizes nearer than this decide nothing: they differ as much between two machines of one kind.
_ALIKE = 0.05


def loss(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4f}"


def signed(value: float) -> str:
    """`-0.0123` -> `−0.0123`, with a minus sign as wide as the plus."""
    return f"{value:+.4f}".replace("-", "−")


def apart(difference: float) -> str:
    """`0.0123 nats below`."""
    return f"{abs(difference):.4f} nats {'above' if difference >= 0 else 'below'}"


def between(interval: Interval) -> str:
    return f"{signed(interval.low)} to {signed(interval.high)}"


def meaning(found: Difference) -> str:
    """`not worse, as the whole interval lies below the margin of 0.01`."""
    margin = f"the margin of {found.margin:g}"
    return {
        "better": "better, as the whole interval lies below 0",
        "not worse": f"not worse, as the whole interval lies below {margin}",
        "worse": f"worse, as the whole interval lies above {margin}",
        "inconclusive": f"not settled, as {margin} lies within the interval",
    }[found.verdict]


def spread(score: Score) -> str:
    """`0.312 [0.280, 0.344]`, without an interval where it says nothing."""
    interval = score.telling_interval
    return f"{score.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]" if interval else f"{score.value:.3f}"


def intervals_of(scores: Sequence[Score]) -> str:
    """`95% intervals`, empty where none of them is shown."""
    shown = [score.telling_interval for score in scores if score.telling_interval]
    return f"{level(shown[0])} intervals" if shown else ""


def level(interval: Interval) -> str:
    return f"{100 * interval.level:g}%"


def size(num_bytes: float | None) -> str:
    return format_bytes(num_bytes) if num_bytes else NOTHING


def speed(value: float | None) -> str:
    return f"{value:,.0f}" if value else NOTHING


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def needed_bytes(arm: ArmResult) -> int | None:
    """What the arm's memory is judged by: the device's peak, without a device the host's; None if not known."""
    return arm.peak_device_bytes or arm.peak_host_bytes or None


def alike(value: float, other: float) -> bool:
    return abs(value / other - 1) <= _ALIKE


def memory_beside(arm: ArmResult, other: ArmResult) -> str:
    """`takes 38% less memory (6.10 GiB, not 9.84 GiB)`; empty where one is not known."""
    own, others = needed_bytes(arm), needed_bytes(other)
    if own is None or others is None:
        return ""
    if alike(own, others):
        return f"takes about as much memory ({size(own)} and {size(others)})"
    word = "less" if own < others else "more"
    return f"takes {abs(own / others - 1):.0%} {word} memory ({size(own)}, not {size(others)})"


def speed_beside(arm: ArmResult, other: ArmResult) -> str:
    """`is 12% slower (15,100 tokens/s, not 17,200)`; empty where one is not known."""
    own, others = arm.tokens_per_second, other.tokens_per_second
    if not own or not others:
        return ""
    if alike(own, others):
        return f"is about as fast ({speed(own)} and {speed(others)} tokens/s)"
    word = "slower" if own < others else "faster"
    return f"is {abs(own / others - 1):.0%} {word} ({speed(own)} tokens/s, not {speed(others)})"
