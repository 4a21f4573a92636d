"""What every kept result says of where it comes from."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch


def origin() -> dict[str, Any]:
    """Card, versions, command and date of this process."""
    packages = ("torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate")
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "cuda": torch.version.cuda,
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def write_result(path: Path, rows: Any, **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**origin(), **more, "rows": rows}, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
