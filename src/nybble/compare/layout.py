"""Where the runs of a comparison lie, and the settings of each: `<arm>/seed-0`, or `<arm>/lr-0.001/seed-0` if swept."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nybble.compare.config import Arm, CompareConfig
from nybble.compare.folder import Measured, RunFolder
from nybble.compare.result import Sweep
from nybble.compare.rows import digest_rows
from nybble.config import RunConfig
from nybble.errors import UserError
from nybble.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class PlannedRun:
    """arm, at `config`'s learning rate and seed. folder: of the run, which is `config.output`."""

    arm: Arm
    config: RunConfig
    folder: RunFolder

    @property
    def title(self) -> str:
        if not self.arm.trained:
            return self.arm.name
        return f"{self.arm.name}, learning rate {self.config.optim.learning_rate:g}, seed {self.config.train.seed}"


@dataclass(frozen=True)
class Layout:
    """All runs of a comparison: of `compare`, over the settings `shared`, below `output`."""

    shared: RunConfig
    compare: CompareConfig
    output: Path

    @property
    def seeds(self) -> tuple[int, ...]:
        first = self.shared.train.seed
        return tuple(range(first, first + self.compare.seeds))

    @property
    def chooses(self) -> bool:
        """Whether held-out rows choose anything: a learning rate, or the best of several evaluations."""
        return self.compare.sweeps or any(self.config(arm).train.eval_every for arm in self.compare.trained)

    @property
    def how_measured(self) -> dict[str, Any]:
        """What decides which rows are measured and what is asked of them, for `Measured.how`."""
        compare = self.compare
        asked = {"samples": compare.samples, "sample_tokens": compare.sample_tokens}
        known = {"rows": self._digests["test rows"]} if "test rows" in self._digests else {}
        return {"test": compare.test, "chooses": self.chooses, **asked, **known}

    @cached_property
    def _digests(self) -> dict[str, str]:
        return digest_rows(self.shared.data, self.compare.test)

    def contents(self, arm: Arm) -> dict[str, str]:
        """Digests of what decides the runs of `arm` and no setting tells: what lies where base and data are."""
        model, rows = self.config(arm).model, ["training rows"] * arm.trained
        if arm.trained and self.chooses:
            rows.append("validation rows")
        found = {name: self._digests[name] for name in rows if name in self._digests}
        try:
            base = Checkpoint.open(model.name, model.revision, trust_remote_code=model.trust_remote_code)
        except UserError:  # loading it says more
            return found
        return {"base weights": base.fingerprint, **found}

    def config(self, arm: Arm) -> RunConfig:
        """The settings of `arm`, but for its output, seed and learning rate; UserError if they are not valid."""
        return self._configs[arm.name]

    @cached_property
    def _configs(self) -> dict[str, RunConfig]:
        return {arm.name: arm.config(self.shared) for arm in self.compare.arms}

    def run(self, arm: Arm, seed: int, rate: float | None = None) -> PlannedRun:
        """rate: of a sweep; None: what the arm's settings say."""
        config = self.config(arm)
        folder = self.output / arm.name
        if rate is not None:
            config = config.model_copy(update={"optim": config.optim.model_copy(update={"learning_rate": rate})})
            folder /= f"lr-{rate:g}"
        if arm.trained:
            folder /= f"seed-{seed}"
        train = config.train.model_copy(update={"seed": seed})
        config = config.model_copy(update={"train": train, "output": str(folder)})
        matters = set(RunConfig.model_fields) - {"output"} if arm.trained else {"model", "data"}
        # Through JSON, so that it compares equal with what is read back.
        return PlannedRun(arm, config, RunFolder(folder, json.loads(config.model_dump_json(include=matters))))

    def measured(self, run: PlannedRun) -> Measured | None:
        """What the test rows gave after `run`, if it was measured as this comparison measures, as far as is known.

        A loss that is not finite is none, as no interval holds it.
        """
        found = run.folder.measured
        if found is None or not math.isfinite(found.loss):
            return None
        now = self.how_measured
        return found if all(found.how[name] == now[name] for name in found.how.keys() & now.keys()) else None

    def merges(self, run: PlannedRun) -> bool:
        """Whether the adapter of `run`, which is among the results, is to be merged: the first seed's."""
        wanted = self.compare.merge and run.arm.trained and run.config.method != "full"
        return wanted and run.config.train.seed == self.seeds[0]

    def sweep(self, arm: Arm) -> list[PlannedRun]:
        """One run with the first seed for each learning rate that there is to choose from."""
        return [self.run(arm, self.seeds[0], rate) for rate in self.compare.rates_of(arm)]

    def chosen_rate(self, arm: Arm) -> float | None:
        """The swept learning rate with the lowest loss on the validation rows; None if none was, or all failed.

        One that is not finite is left out: NaN is neither below nor above any other, and would win if it came first.
        """
        losses = [(point.loss, point.learning_rate) for point in self.swept(arm) if point.loss is not None]
        found = [(loss, rate) for loss, rate in losses if math.isfinite(loss)]
        return min(found)[1] if found else None

    def swept(self, arm: Arm) -> list[Sweep]:
        """What became of each learning rate that was tried so far.

        A run of a time when there was nothing to choose was not tried until it is evaluated too.
        """
        points = []
        for run in self.sweep(arm):
            trained, failure = run.folder.trained, run.folder.failure
            tried = trained is not None and trained.evaluated
            if tried or failure:
                loss = trained.validation_loss if trained else None
                rate, seed = run.config.optim.learning_rate, run.config.train.seed
                points.append(Sweep(rate, seed, loss, str(failure) if failure and not tried else None))
        return points

    def results(self, arm: Arm) -> list[PlannedRun]:
        """The runs that give the arm's result, of which a sweep's best is the first; none while it is not known."""
        if not arm.trained:
            return [self.run(arm, self.seeds[0])]
        rate = None
        if self.compare.rates_of(arm):
            rate = self.chosen_rate(arm) if len(self.compare.rates_of(arm)) > 1 else self.compare.rates_of(arm)[0]
            if rate is None:
                return []
        return [self.run(arm, seed, rate) for seed in self.seeds]

    def runs_of(self, arm: Arm) -> list[PlannedRun]:
        """Every run of `arm` that may be done, at whatever learning rate."""
        rates: tuple[float | None, ...] = self.compare.rates_of(arm) or (None,)
        return [self.run(arm, seed, rate) for rate in rates for seed in (self.seeds if arm.trained else self.seeds[:1])]

    def all_runs(self) -> list[PlannedRun]:
        return [run for arm in self.compare.arms for run in self.runs_of(arm)]
