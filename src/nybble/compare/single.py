"""What a comparison finds out, as plain values: one line an arm."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from nybble.errors import UserError, did_you_mean
from nybble.files import check_writable, read_json, write_json

Arm = Literal["base", "lora", "qlora", "full"]
ARMS: tuple[Arm, ...] = get_args(Arm)

FILE = "arm.json"


@dataclass(frozen=True)
class ArmResult:
    """One arm, measured in a process of its own.

    loss_before, loss_after: on the held-out rows, in nats a target token. tokens_per_second: tokens of the batches
    (prompts too, no padding) while training; of the evaluation for the base, which is not trained. disk_bytes: of the
    adapter or the model that was written; of the checkpoint for the base.
    """

    arm: Arm
    storage: str
    trainable: int
    total: int
    loss_before: float
    loss_after: float
    tokens_per_second: float
    steps: int
    seconds: float
    peak_host_bytes: int
    peak_device_bytes: int | None
    disk_bytes: int

    @property
    def gain(self) -> float:
        """Nats by which the held-out loss fell."""
        return self.loss_before - self.loss_after


@dataclass(frozen=True)
class Comparison:
    """Arms on the same data, with the same seeds and steps; each left its run in a folder of its name in `output`."""

    output: Path
    arms: tuple[ArmResult, ...]

    def arm(self, name: Arm) -> ArmResult:
        return next(result for result in self.arms if result.arm == name)

    def figures(self) -> dict[str, Any]:
        """As JSON values."""
        return {"output": str(self.output), "arms": [asdict(result) | {"gain": result.gain} for result in self.arms]}


@dataclass(frozen=True)
class ArmFolder:
    """The folder of one arm and the record in it: the settings it was begun with and, once finished, its result."""

    path: Path
    settings: dict[str, Any]

    def begin(self) -> None:
        check_writable(self.path)
        write_json(self.path / FILE, {"settings": self.settings})

    def finish(self, result: ArmResult) -> None:
        write_json(self.path / FILE, {"settings": self.settings, "result": asdict(result)})

    def result(self) -> ArmResult | None:
        """What was found, None if the arm is not finished."""
        values = self._read().get("result")
        return ArmResult(**values) if values else None

    @property
    def begun(self) -> bool:
        return (self.path / FILE).exists()

    def changed_settings(self) -> list[str]:
        """Names of the sections that differ from those the arm was begun with."""
        before = self._read().get("settings", self.settings)
        return [name for name in self.settings if before.get(name) != self.settings[name]]

    def _read(self) -> dict[str, Any]:
        values: dict[str, Any] = read_json(self.path / FILE) if self.begun else {}
        return values


def parse_arms(text: str) -> tuple[Arm, ...]:
    """`lora,qlora` -> ("lora", "qlora"); raises UserError for an unknown one."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in ARMS]
    if unknown or not names:
        guess = did_you_mean(unknown[0], list(ARMS)) if unknown else None
        fix = f"Did you mean {guess!r}?" if guess else f"Choose from {', '.join(ARMS)}."
        raise UserError(f"no such arm: {', '.join(unknown) or '(none named)'}", where="--arms", fix=fix)
    return tuple(arm for arm in ARMS if arm in names)
