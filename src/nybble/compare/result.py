"""What a comparison finds out, as plain values: `comparison.json`, the one source of its table and its report.

Losses are in nats a target token unless said. Sizes are in bytes, times in seconds. None: not measured, or it cannot be
measured here. Nothing is rounded. Every run that was begun is in it, failed ones too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

from pydantic import TypeAdapter

from nybble.evaluation.intervals import Interval as Interval
from nybble.evaluation.scores import Score as Score
from nybble.files import read_json, write_json

FORMAT = 1
FILE = "comparison.json"

Status = Literal["finished", "failed", "unfinished"]
Verdict = Literal["better", "not worse", "inconclusive", "worse"]


@dataclass(frozen=True)
class Sweep:
    """One learning rate that was tried, with one seed. loss: lowest on the validation rows; None if it failed."""

    learning_rate: float
    seed: int
    loss: float | None
    error: str | None = None


@dataclass(frozen=True)
class Curve:
    """How one run went, as columns of equal length: one value a step, then one an evaluation.

    losses: of the training data, before the step's update. tokens, seconds: since the first step, padding counted,
    evaluation and saving not. validation_losses: at `validation_steps`, of which the first may be 0.
    """

    steps: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    validation_steps: tuple[int, ...] = ()
    validation_losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class PhaseMemory:
    """The peak of one phase of a run: "load", "train" or "evaluate"; device_bytes is None without a device."""

    phase: str
    host_bytes: int
    device_bytes: int | None


@dataclass(frozen=True)
class SeedResult:
    """One run of an arm: one seed at the arm's learning rate.

    sequence_losses: sum of the loss over the target tokens of each test row, in `Comparison.test`'s order; its sum over
    the sum of their target tokens is `loss`, the held-out loss after training. loss_before: of the model before the
    first step, adapter and all. tokens_per_second: of the median step, the first ones left out; tokens: that were
    trained on. seconds_to_loss: until training reached `Comparison.common_loss`. energy_joules: of the device from
    before the first step until the result is saved, which took energy_seconds. scores: of its answers to test rows, by
    name, like "exact match"; None where the data have no answers.
    """

    seed: int
    folder: str
    status: Status
    error: str | None = None
    loss_before: float | None = None
    loss: float | None = None
    sequence_losses: tuple[float, ...] = ()
    curve: Curve = Curve()
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    tokens_per_second: float | None = None
    seconds_to_loss: float | None = None
    energy_joules: float | None = None
    energy_seconds: float | None = None
    memory: tuple[PhaseMemory, ...] = ()
    scores: dict[str, float] | None = None


@dataclass(frozen=True)
class MergeResult:
    """The first seed's adapter merged into a base, on the test rows.

    base: "original", the checkpoint's own weights, or "dequantized", what 4 bits made of them.
    """

    base: str
    adapter_loss: float
    merged_loss: float
    largest_logit_gap: float


@dataclass(frozen=True)
class ArmResult:
    """One way to train (or, for the base, not to): its settings and what its runs gave.

    overrides: what this arm changes in the comparison's settings, by dotted names. config: all of its settings.
    learning_rate: what its runs used, the best of `sweep` if there was one. loss_interval: of the held-out loss over
    the seeds, or over the test rows if there is one seed. scores: of answers to test rows, with intervals of the same
    kind. trainable, total: parameters; trainable is 0 for the base,
    which has one run, of no steps. disk_bytes: of the adapter or model written; of the checkpoint for the base.
    predicted_bytes: what the planner expects on the device, by phase ("load", "step", ...) and then by what holds it.
    merges: one for each base that was tried.
    """

    name: str
    status: Status
    method: str
    storage: str
    overrides: dict[str, Any]
    config: dict[str, Any]
    learning_rate: float | None
    loss_interval: Interval | None = None
    scores: tuple[Score, ...] = ()
    trainable: int = 0
    total: int = 0
    disk_bytes: int = 0
    weight_bytes: int = 0
    runs: tuple[SeedResult, ...] = ()
    sweep: tuple[Sweep, ...] = ()
    merges: tuple[MergeResult, ...] = ()
    predicted_bytes: dict[str, dict[str, int]] | None = None
    error: str | None = None

    @property
    def finished(self) -> tuple[SeedResult, ...]:
        """The runs that have a result."""
        return tuple(run for run in self.runs if run.status == "finished")

    @property
    def loss_before(self) -> float | None:
        return _mean([run.loss_before for run in self.finished])

    @property
    def loss_after(self) -> float | None:
        """Mean held-out loss over the seeds."""
        return _mean([run.loss for run in self.finished])

    def score(self, name: str) -> Score | None:
        return next((score for score in self.scores if score.name == name), None)

    @property
    def gain(self) -> float | None:
        """Nats by which the held-out loss fell."""
        before, after = self.loss_before, self.loss_after
        return None if before is None or after is None else before - after

    @property
    def tokens_per_second(self) -> float | None:
        speeds = [run.tokens_per_second for run in self.finished if run.tokens_per_second]
        return median(speeds) if speeds else None

    @property
    def steps(self) -> int:
        return max((run.steps for run in self.runs), default=0)

    @property
    def seconds(self) -> float:
        return sum(run.seconds for run in self.runs)

    @property
    def peak_host_bytes(self) -> int:
        return max((phase.host_bytes for run in self.finished for phase in run.memory), default=0)

    @property
    def peak_device_bytes(self) -> int | None:
        return max((phase.device_bytes or 0 for run in self.finished for phase in run.memory), default=0) or None


@dataclass(frozen=True)
class Difference:
    """An arm's held-out loss less the reference's, paired by seed and by test row. Negative: the arm is better.

    seeds: those that both finished. by_seed: the difference for each of them; mean: over them. interval: what the
    verdict is given by, over seeds if there are two or more, otherwise `over_rows`, the bootstrap over test rows.
    verdict: "better" if the whole interval is below 0, "not worse" if it is below the margin, "worse" if it is above
    the margin, else "inconclusive".
    """

    arm: str
    reference: str
    seeds: tuple[int, ...]
    mean: float
    by_seed: tuple[float, ...]
    interval: Interval
    over_rows: Interval
    margin: float
    verdict: Verdict


@dataclass(frozen=True)
class Statement:
    """What was laid down before the first run, so that no result could choose it.

    margin: nats by which an arm may be worse than `reference` and still count as not worse. learning_rates: swept for
    every arm that does not bring its own. stated_at: when, ISO 8601 in UTC. changes: what was altered after results
    were there, one line each.
    """

    reference: str
    margin: float
    level: float
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    stated_at: str
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeldOutRows:
    """Rows to measure by. source: where they come from, in words. target_tokens: of each row.

    duplicates: how many are training rows too, as far as was looked for.
    """

    source: str
    target_tokens: tuple[int, ...]
    duplicates: int = field(default=0, compare=False)

    @property
    def rows(self) -> int:
        return len(self.target_tokens)


@dataclass(frozen=True)
class Sample:
    """A test row as each arm answers it (its first seed, greedy). expected: the answer in the data, or its text."""

    prompt: str
    expected: str
    answers: dict[str, str]


@dataclass(frozen=True)
class Machine:
    """device: "cuda" or "cpu", with its name; memory_bytes: the device's, or the host's. versions: of packages."""

    device: str
    name: str
    memory_bytes: int
    cores: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Advice:
    """choice: the arm to take, None while it is open. points: the reasons. cautions: what the figures cannot carry."""

    choice: str | None
    headline: str
    because: str
    points: tuple[str, ...]
    cautions: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Arms on the same data, in the same order, with the same seeds; a folder for each in `output`.

    command: reruns it, None if it was not begun on the command line. settings: those that all arms share; config.yaml
    in `output` holds them too. arms: in the order they were named. differences: of every other trained arm against the
    reference. validation, test: rows; validation rows choose learning rates and checkpoints, test rows give the
    results. common_loss: the lowest loss that every trained arm reached (common_loss_of: "validation" or "training",
    the latter as a running mean), to which seconds_to_loss counts. verdict: which arm to choose and why;
    None until it is given.
    """

    format: int
    output: str
    title: str
    command: str | None
    settings: dict[str, Any]
    statement: Statement
    machine: Machine
    train_rows: int
    train_tokens: int
    validation: HeldOutRows
    test: HeldOutRows
    arms: tuple[ArmResult, ...]
    differences: tuple[Difference, ...] = ()
    samples: tuple[Sample, ...] = ()
    common_loss: float | None = None
    common_loss_of: str | None = None
    seconds: float = 0.0
    verdict: Advice | None = None

    @property
    def score_names(self) -> tuple[str, ...]:
        """Of all scores that any arm has."""
        return tuple(dict.fromkeys(score.name for arm in self.arms for score in arm.scores))

    def arm(self, name: str) -> ArmResult:
        return next(result for result in self.arms if result.name == name)

    def difference(self, arm: str) -> Difference | None:
        """Of `arm` against the reference."""
        return next((found for found in self.differences if found.arm == arm), None)

    def figures(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def write(self, folder: Path) -> Path:
        write_json(folder / FILE, self.figures())
        return folder / FILE


_COMPARISON = TypeAdapter(Comparison)


def read_comparison(path: Path) -> Comparison:
    """The comparison in a file, or in the folder that holds one."""
    return _COMPARISON.validate_python(read_json(path / FILE if path.is_dir() else path))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
