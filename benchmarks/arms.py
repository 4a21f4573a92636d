"""Arms of a comparison in which only losses count: a process each, all at once on one card, on the same text."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from subprocess import PIPE
from typing import Any

import torch
from results import received_row

HELD_OUT = ("http", "json", "logging", "urllib")  # packages of the library that are never trained on
# Large tables of letters, and what some distributions leave out.
NOT_TEXT = {"encodings", "lib-dynload", "pydoc_data"}


def library_windows(model: str, steps: int, batch: int, seq_len: int) -> torch.Tensor:
    """Token ids (steps, batch, seq_len) from the standard library's source files, in the order of their names."""
    return _windows(model, training_files(), (steps, batch, seq_len))


def held_out_windows(model: str, steps: int, batch: int, seq_len: int) -> torch.Tensor:
    """As `library_windows`, from files that it never has."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [file for package in HELD_OUT for file in sorted((folder / package).rglob("*.py"))]
    return _windows(model, files, (steps, batch, seq_len))


def training_files() -> list[Path]:
    from nybble.demo.docstrings import NO_LIBRARY, NOT_EVERYWHERE

    folder = Path(sysconfig.get_path("stdlib"))
    left_out = NO_LIBRARY | NOT_EVERYWHERE | NOT_TEXT | set(HELD_OUT)
    below = [file for file in folder.glob("*/**/*.py") if not left_out.intersection(file.relative_to(folder).parts)]
    return [*sorted(folder.glob("*.py")), *sorted(below)]


def _windows(model: str, files: Iterable[Path], shape: tuple[int, int, int]) -> torch.Tensor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    needed, tokens = shape[0] * shape[1] * shape[2], []
    for file in files:
        tokens += tokenizer(file.read_text(encoding="utf-8", errors="ignore"), verbose=False).input_ids
        if len(tokens) >= needed:
            return torch.tensor(tokens[:needed]).view(shape)
    raise SystemExit(f"the library has {len(tokens)} tokens in the files taken, {needed} are needed")


def run_arms(arms: Sequence[str], *arguments: str) -> Iterator[dict[str, Any]]:
    """Start this script once more for each arm, with `--arm` and its name, and wait for the rows that they send."""
    command = [sys.executable, *sys.argv, *arguments, "--arm"]
    running = {arm: subprocess.Popen([*command, arm], stdout=PIPE, stderr=PIPE, text=True) for arm in arms}
    for arm, process in running.items():
        output, errors = process.communicate()
        figures = received_row(output)
        if figures is None:
            print(f"FAILED {arm}\n{errors[-1500:]}", flush=True)
            continue
        print(arm, figures["loss"][0], figures["loss"][-1], flush=True)
        yield figures


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean absolute difference."""
    return statistics.mean(abs(a - b) for a, b in zip(one, other, strict=True))


def add_sizes(parser: argparse.ArgumentParser, *, steps: int) -> None:
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
