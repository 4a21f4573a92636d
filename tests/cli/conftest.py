"""Commands as a user types them, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from nybble.cli import app

SMALL = ("--set", "train.max_steps=3", "--set", "train.batch_size=2", "--set", "data.max_length=64")


@pytest.fixture
def nybble(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`nybble("train", "--model", folder)`: runs the command; wide output, so that nothing is folded."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: object, fails: int = 0) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="nybble")
        assert result.exit_code == fails, result.output
        return result

    return run


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few conversations to train on, and others held out."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train", 12), ("valid", 4)):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"What is {name} {i}?"},
                    {"role": "assistant", "content": f"It is the number {i}."},
                ]
            }
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def trained(tiny: Callable[..., Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a QLoRA run on a tiny model."""
    from nybble.config import RunConfig
    from nybble.train.run import run_training

    output = tmp_path_factory.mktemp("runs") / "qlora"
    settings = {
        "model.name": str(tiny("smollm")),
        "data.path": str(data),
        "output": str(output),
        "data.max_length": 64,
        "train.max_steps": 4,
        "optim.learning_rate": 0.02,
    }
    run_training(RunConfig.read(None, settings), quiet=True)
    return output
