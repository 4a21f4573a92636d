"""TensorBoard, Weights & Biases, MLflow and Trackio by name, through Accelerate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from nybble.errors import UserError
from nybble.train.loop import StepResult
from nybble.train.state import Evaluation

_PROJECT = "nybble"


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise UserError if the package of a tracker is missing: Accelerate would go on without it."""
    available = {str(tracker.value) for tracker in get_available_trackers()}
    if missing := [name for name in names if name not in available]:
        packages = " ".join(missing)  # on PyPI they have these names too
        raise UserError(
            f"not installed: {', '.join(missing)}", where="train.trackers", fix=f"Run: pip install {packages}"
        )


class Trackers:
    """The trackers of one run; without any, every call does nothing."""

    def __init__(self, accelerator: Accelerator, settings: Mapping[str, Any]) -> None:
        self._accelerator = accelerator
        # TensorBoard takes plain scalars only.
        accelerator.init_trackers(_PROJECT, config={name: str(value) for name, value in settings.items()})

    def step(self, result: StepResult) -> None:
        values = {name: value for name, value in asdict(result).items() if name not in ("step", "skipped", "note")}
        self._accelerator.log(values, step=result.step)

    def evaluation(self, evaluation: Evaluation) -> None:
        self._accelerator.log({"eval_loss": evaluation.loss}, step=evaluation.step)

    def close(self) -> None:
        # Not Accelerator.end_training, which ends the process group as well.
        for tracker in self._accelerator.trackers:
            tracker.finish()
