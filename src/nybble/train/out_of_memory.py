"""Out of memory: which settings would help, with the figures at hand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from nybble.config import RunConfig
from nybble.errors import TrainingStopped
from nybble.train.memory import peak_device_bytes
from nybble.units import format_bytes


@contextlib.contextmanager
def explain_out_of_memory(config: RunConfig, device: torch.device) -> Iterator[None]:
    """Turn running out of device or host memory into a TrainingStopped that says what would help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        what = f"out of memory on {device.type} {_figures(device)}"
        raise TrainingStopped(what, fix="\n".join(["Any of these helps:", *advice(config)])) from error


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # PyTorch's CPU allocator has no exception of its own.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def advice(config: RunConfig) -> list[str]:
    """The settings that lower the peak, those that keep the numbers first, each with the value it has now."""
    train, max_length = config.train, config.data.length_within(None)
    tokens = train.batch_size * max_length
    lines = []
    if config.memory.activations == "keep":
        lines.append("memory.activations=recompute (same numbers, a third more arithmetic)")
    if train.batch_size > 1:
        half = train.batch_size // 2
        lines.append(
            f"train.batch_size={half} (now {train.batch_size}, up to {tokens} tokens at a time) with "
            f"train.gradient_accumulation={train.gradient_accumulation * train.batch_size // half} (same numbers)"
        )
    lines.append(f"data.max_length={max_length // 2} (now {max_length}; longer samples are cut)")
    if config.method == "lora":
        lines.append("method=qlora (holds the linear layers in 4.127 bits a weight instead of 16)")
    if config.method == "full":
        lines.append("method=lora or qlora (full holds a gradient and two moments for every weight)")
    return [f"  {line}" for line in lines]


def _figures(device: torch.device) -> str:
    if device.type != "cuda":
        return f"({format_bytes(peak_device_bytes(device))} held at the peak)"
    free, total = torch.cuda.mem_get_info(device)
    return (
        f"({format_bytes(total)} in all, {format_bytes(free)} free, "
        f"{format_bytes(peak_device_bytes(device))} held by this run at its peak)"
    )
