"""Out of memory: what ran out where, and which settings would help, with the figures at hand."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence

import torch

from nybble.config import RunConfig
from nybble.errors import TrainingStopped
from nybble.memory.budget import allowed_bytes, available_bytes
from nybble.memory.lack import is_of_the_host, is_out_of_memory
from nybble.train.memory import peak_device_bytes, peak_host_bytes
from nybble.units import format_bytes

_AMOUNT = r"([\d.]+) (bytes|[KMGT]iB)"


@contextlib.contextmanager
def explain_out_of_memory(
    config: RunConfig,
    device: torch.device,
    *,
    during: str | None = None,
    suggest: Callable[[], str] | None = None,
) -> Iterator[None]:
    """Turn running out of device or host memory into a TrainingStopped that says when, and what would help.

    during: the phase of the run, as in "loading the model". suggest: what would help; else what helps any run.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fix = suggest() if suggest else suggestion(config)
        raise TrainingStopped(describe(error, device), where=during, fix=fix) from error


def describe(error: BaseException, device: torch.device) -> str:
    """What ran out, with the bytes that were asked for and those that there are."""
    asked = _asked_bytes(str(error))
    figures = [f"{format_bytes(asked)} more were asked for"] if asked is not None else []
    if device.type == "cuda" and not is_of_the_host(error):
        _, total = torch.cuda.mem_get_info(device)
        allowed = allowed_bytes(device)
        figures += [
            _left(str(error), device, asked),
            f"{format_bytes(peak_device_bytes(device))} held at the peak",
            f"{format_bytes(total)} in all"
            + (f", {format_bytes(allowed)} for tensors within memory.budget" if allowed < total else ""),
        ]
        return f"out of memory on cuda ({', '.join(figures)})"
    figures.append(f"{format_bytes(peak_host_bytes())} held at the peak")
    return f"out of memory on {'cpu' if device.type == 'cpu' else 'the host'} ({', '.join(figures)})"


def suggestion(config: RunConfig, best: Sequence[str] = ()) -> str:
    """Settings that need less: `best`, if anything is known of the run, and those that help any."""
    return "\n".join(["Any of these helps:", *(f"  {line}" for line in [*best, *advice(config)])])


def advice(config: RunConfig) -> list[str]:
    """The settings that lower the peak, those that keep the numbers first, each with the value it has now."""
    train, max_length = config.train, config.data.length_within(None)
    tokens = train.batch_size * max_length
    lines = []
    if config.memory.activations == "keep":
        lines.append("memory.activations=recompute (now keep; same numbers, a third more arithmetic)")
    if config.memory.moments == "resident":
        lines.append(
            "memory.moments=paged (now resident; same numbers: they leave while a long sequence needs the room)"
        )
    if train.batch_size > 1:
        total = train.batch_size * train.gradient_accumulation
        fewer = max(count for count in range(1, train.batch_size) if total % count == 0)
        lines.append(
            f"train.batch_size={fewer} (now {train.batch_size}, up to {tokens} tokens at a time) with "
            f"train.gradient_accumulation={total // fewer} (same numbers)"
        )
    lines.append(f"data.max_length={max_length // 2} (now {max_length}; longer samples are cut)")
    if config.method == "lora":
        lines.append("method=qlora (holds the linear layers in 4.127 bits a weight instead of 16)")
    if config.method == "full":
        lines.append("method=lora or qlora (full holds a gradient and two moments for every weight)")
    return lines


def _left(message: str, device: torch.device, asked: int | None) -> str:
    """What of a GPU was left as the error came: much of what was held then is free again by now."""
    left = available_bytes(device)
    held = re.search(rf"memory {_AMOUNT} is allocated by PyTorch", message)
    if held is None:
        return f"{format_bytes(left)} left"
    left = max(0, left + torch.cuda.memory_allocated(device) - _bytes(held))
    return f"{format_bytes(left)} left" + (", in smaller pieces" if asked and left >= asked else "")


def _asked_bytes(message: str) -> int | None:
    """Of PyTorch's messages: `Tried to allocate 1.20 GiB`, `you tried to allocate 4096 bytes`."""
    found = re.search(rf"ried to allocate {_AMOUNT}", message) or re.match(_AMOUNT, message)
    return None if found is None else _bytes(found)


def _bytes(found: re.Match[str]) -> int:
    """Of an _AMOUNT."""
    powers = {"bytes": 0, "KiB": 1, "MiB": 2, "GiB": 3, "TiB": 4}
    return int(float(found[1]) * 1024 ** powers[found[2]])
