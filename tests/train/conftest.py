"""Small real runs: a tiny checkpoint and chats about numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nybble.config import RunConfig

Settings = Callable[..., RunConfig]

ANSWERS = ("It is even.", "It is odd, and so it has no half.", "I do not know this one.")


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 chats with answers of different lengths, so that micro-batches differ in their number of target tokens."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {number}?"},
                {"role": "assistant", "content": " ".join(ANSWERS[: 1 + number % 3])},
            ]
        }
        for number in range(24)
    ]
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def settings(tmp_path: Path, tiny: Callable[..., Path], chats: Path) -> Settings:
    """`settings(**{"lora.r": 4})`: six steps of LoRA on the tiny Llama into `tmp_path / "out"`, with changes."""

    def make(kind: str = "llama", **changes: Any) -> RunConfig:
        values = {
            "model.name": str(tiny(kind)),
            "data.path": str(chats),
            "data.max_length": 96,
            "output": str(tmp_path / "out"),
            "method": "lora",
            "lora.r": 4,
            "optim.learning_rate": 1e-2,
            "train.max_steps": 6,
            "train.batch_size": 2,
        }
        return RunConfig.read(None, values | changes)

    return make
