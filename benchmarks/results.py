"""What every kept result says of where it comes from."""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from nybble.versions import installed_versions

_MARK = "ROW "  # libraries print to standard output too


def card_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"


def origin(device: str | None = None) -> dict[str, Any]:
    """Card, versions, command and date of this process. device: the card's name, if it is known."""
    packages = ("torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate", "unsloth", "liger-kernel")
    return {
        "device": card_name() if device is None else device,
        "python": platform.python_version(),
        "versions": installed_versions(packages),
        "cuda": torch.version.cuda,
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def write_result(path: Path, rows: Any, device: str | None = None, **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**origin(device), **more, "rows": rows}, indent=1) + "\n")


def send_row(row: dict[str, Any]) -> None:
    """Hand a row of figures from a process to the one that started it, by its standard output."""
    print(_MARK + json.dumps(row), flush=True)


def received_rows(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The rows among the lines that a process prints, as they come."""
    for line in lines:
        if line.startswith(_MARK):
            yield json.loads(line.removeprefix(_MARK))


def received_row(output: str) -> dict[str, Any] | None:
    """The row in what a process printed; None if it got nowhere."""
    return next(received_rows(output.splitlines()), None)
