"""The folder of one run of a comparison, and the record in it: what it was begun with and what came of it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from nybble.compare.result import Curve, MergeResult, PhaseMemory
from nybble.config import RunConfig
from nybble.data.example import Example
from nybble.errors import TrainingDiverged, UserError
from nybble.evaluation.scores import answer_scores
from nybble.files import check_writable, read_json, write_json
from nybble.settings import Section, parse_section
from nybble.train.identity import digest_examples

FILE = "compare.json"


@dataclass(frozen=True)
class Trained:
    """What is known of a run once it is trained. result: the folder of the adapter or the model, in the run's own.

    Fields are as in `nybble.compare.result`; validation_loss is the lowest, which picks learning rates; None if
    none is finite, or none was asked for: see `evaluated`.
    """

    storage: str
    trainable: int
    total: int
    weight_bytes: int
    disk_bytes: int
    train_rows: int
    train_tokens: int
    result: str | None = None
    validation_loss: float | None = None
    curve: Curve = field(default_factory=Curve)
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    tokens_per_second: float | None = None
    energy_joules: float | None = None
    energy_seconds: float | None = None
    memory: tuple[PhaseMemory, ...] = ()
    predicted_bytes: dict[str, dict[str, int]] | None = None

    @property
    def evaluated(self) -> bool:
        """Whether rows that choose were there, be the loss on them finite or not."""
        return self.validation_loss is not None or bool(self.curve.validation_losses)


@dataclass(frozen=True)
class Measured:
    """What the test rows gave. sums, sums_before: of the loss over each row's target tokens, after and before training.

    how: what decided which rows these are and what was asked of them; with another `how` it is measured anew.
    prompts, expected, answers: of the rows that were asked. scored: whether `expected` is what there is to say, rather
    than how a text goes on. duplicates: how many rows are training rows too.
    """

    how: dict[str, Any]
    target_tokens: tuple[int, ...]
    validation_tokens: tuple[int, ...]
    test_source: str
    validation_source: str
    sums: tuple[float, ...]
    sums_before: tuple[float, ...]
    memory: tuple[PhaseMemory, ...] = ()
    prompts: tuple[str, ...] = ()
    expected: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    scored: bool = False
    duplicates: int = 0

    @property
    def loss(self) -> float:
        return sum(self.sums) / sum(self.target_tokens)

    @property
    def loss_before(self) -> float:
        return sum(self.sums_before) / sum(self.target_tokens)

    @property
    def scores(self) -> dict[str, list[float]]:
        """By name, the score of each answer; none where there is nothing to score."""
        pairs = zip(self.answers, self.expected, strict=True) if self.scored else ()
        found = [answer_scores(given, [expected]) for given, expected in pairs]
        return {name: [scores[name] for scores in found] for name in (found[0] if found else ())}


_TRAINED, _MEASURED = TypeAdapter(Trained), TypeAdapter(Measured)


@dataclass(frozen=True)
class Failure:
    """lasting: the same settings would fail again, as with a loss that is not finite; others are tried again."""

    what: str
    where: str | None = None
    fix: str | None = None
    lasting: bool = False

    @classmethod
    def of(cls, error: Exception) -> Failure:
        if isinstance(error, UserError):
            return cls(error.what, error.where, error.fix, isinstance(error, TrainingDiverged))
        return cls(f"{type(error).__name__}: {error}")

    def error(self) -> UserError:
        return UserError(self.what, where=self.where, fix=self.fix)

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.where else self.what


@dataclass
class RunFolder:
    """settings: all that decides the run's numbers, as JSON values by section."""

    path: Path
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def begun(self) -> bool:
        return (self.path / FILE).exists()

    def begin(self, contents: Mapping[str, str] | None = None) -> None:
        """Claim the folder; what an earlier call left is kept if the run can go on from it.

        contents: digests by name of what the run is begun with, see `changed_contents`.
        """
        if self.begun and not self.can_resume:
            shutil.rmtree(self.path)  # begun by an earlier call that got nowhere
        check_writable(self.path)
        begun_with = {"settings": self.settings, "contents": dict(contents or {})}
        self._update(**begun_with, in_progress=True, failure=None)

    def finish_training(self, trained: Trained) -> None:
        self._update(trained=asdict(trained), in_progress=False)

    def note_before(self, rows: Sequence[Example], sums: Sequence[float]) -> None:
        """Keep what the test rows gave before the first step."""
        self._update(before={"rows": digest_examples(rows), "sums": list(sums)})

    def begin_measuring(self) -> None:
        self._update(in_progress=True)

    def finish_measuring(self, measured: Measured) -> None:
        """What merging gave on other rows goes."""
        self._update(measured=asdict(measured), merges=None, in_progress=False)

    def finish_merging(self, merges: Sequence[MergeResult]) -> None:
        self._update(merges=[asdict(merge) for merge in merges], in_progress=False)

    def fail(self, failure: Failure) -> None:
        self._update(failure=asdict(failure), in_progress=False)

    def forgive(self) -> None:
        """Before anything runs: forget a failure that need not happen again, and that an earlier call broke off here.

        What is in progress when a process is killed is what killed it.
        """
        if self.in_progress:
            self._update(in_progress=False)
        if (failure := self.failure) and not failure.lasting:
            self._update(failure=None)

    @property
    def trained(self) -> Trained | None:
        values = self._read().get("trained")
        return _TRAINED.validate_python(values) if values else None

    @property
    def measured(self) -> Measured | None:
        values = self._read().get("measured")
        return _MEASURED.validate_python(values) if values else None

    @property
    def merges(self) -> tuple[MergeResult, ...] | None:
        values = self._read().get("merges")
        return None if values is None else tuple(MergeResult(**value) for value in values)

    def sums_before(self, rows: Sequence[Example]) -> tuple[float, ...] | None:
        """What `note_before` kept, if that was of these rows."""
        values = self._read().get("before")
        return tuple(values["sums"]) if values and values.get("rows") == digest_examples(rows) else None

    @property
    def failure(self) -> Failure | None:
        values = self._read().get("failure")
        return Failure(**values) if values else None

    @property
    def in_progress(self) -> bool:
        return bool(self._read().get("in_progress"))

    @property
    def can_resume(self) -> bool:
        """Whether an earlier call left a checkpoint of an unfinished run."""
        record = self.path / "run.json"
        if not any(self.path.glob("checkpoints/step-*")) or not record.exists():
            return False
        unfinished: bool = read_json(record).get("status") != "finished"
        return unfinished

    def changed_settings(self) -> list[str]:
        """Names of the sections that differ from those the run was begun with."""
        before = self._read().get("settings", self.settings)
        return [name for name, now in self.settings.items() if _with_defaults(name, before.get(name)) != now]

    def changed_contents(self, now: Mapping[str, str]) -> list[str]:
        """Names of the digests that differ from those the run was begun with, as far as both are known."""
        before = self._read().get("contents", {})
        return [name for name, digest in now.items() if before.get(name, digest) != digest]

    def _read(self) -> dict[str, Any]:
        values: dict[str, Any] = read_json(self.path / FILE) if self.begun else {}
        return values

    def _update(self, **values: Any) -> None:
        write_json(self.path / FILE, self._read() | values)


def _with_defaults(name: str, values: Any) -> Any:
    """A section as it was recorded; settings that came into being since have what they are left out as."""
    section = RunConfig.model_fields[name].annotation
    if not isinstance(values, dict) or not (isinstance(section, type) and issubclass(section, Section)):
        return values
    try:
        return parse_section(section, values).model_dump(mode="json")
    except UserError:  # a setting that is no more
        return values
