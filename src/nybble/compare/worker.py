"""The runs of arms that may share a base, one after another in one process; what each gives is in its folder."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from nybble.adapters.io import attach_adapter
from nybble.adapters.report import count_parameters
from nybble.adapters.saved import read_adapter
from nybble.compare.config import Arm
from nybble.compare.folder import Failure, Measured, RunFolder, Trained
from nybble.compare.layout import Layout, PlannedRun
from nybble.compare.measure import answers, merge_results, questions
from nybble.compare.outcome import trained
from nybble.compare.peaks import EnergyMeter, Meter
from nybble.compare.resident import ResidentBase, leaves_base, starts_at_base
from nybble.compare.rows import ComparedRows
from nybble.errors import UserError
from nybble.evaluation.held_out import row_losses
from nybble.files import write_text
from nybble.inference import load_for_inference
from nybble.models.dtypes import resolve_device, resolve_storage
from nybble.models.load import LoadedModel
from nybble.models.loss import CausalLMLoss
from nybble.train.run import run_training

if TYPE_CHECKING:
    from nybble.train.cadence import Run


def run_arms(layout: Layout, arms: Sequence[Arm], *, quiet: bool = False) -> None:
    """Do what is left to do of `arms`, which have one `base_key`; failures are kept in their folders."""
    worker = Worker(layout, quiet=quiet)
    for arm in arms:
        worker.run(arm)
    worker.merge(arms)


def is_finished(layout: Layout, arm: Arm) -> bool:
    """Whether nothing of `arm` is left to do, failures aside."""
    if arm.trained and not all(run.folder.trained or run.folder.failure for run in layout.sweep(arm)):
        return False
    return all(_is_done(layout, run) for run in layout.results(arm))


def how_measured(layout: Layout, run: PlannedRun) -> dict[str, Any]:
    """What decides which rows are measured and what is asked, for `Measured.how`."""
    compare = layout.compare
    samples = compare.samples if run.config.train.seed == layout.seeds[0] or not run.arm.trained else 0
    asked = {"samples": samples, "sample_tokens": compare.sample_tokens if samples else 0}
    return {"test": compare.test, "chooses": layout.chooses, **asked}


class Worker:
    def __init__(self, layout: Layout, *, quiet: bool) -> None:
        self.layout = layout
        self.quiet = quiet
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self.meter = Meter(resolve_device())
        self.energy = EnergyMeter(self.meter.device)
        self.base = ResidentBase(self.meter, test=layout.compare.test, chooses=layout.chooses)
        self.sums_before: tuple[float, ...] = ()  # of the base

    def run(self, arm: Arm) -> None:
        """Try the arm's learning rates, then train and measure each seed at the best of them."""
        if len(swept := self.layout.sweep(arm)) > 1:
            for run in swept:
                self._attempt(run, self._train)
        for run in self.layout.results(arm):
            if arm.trained:
                self._attempt(run, self._train)
            self._attempt(run, self._measure if arm.trained else self._measure_base)

    def merge(self, arms: Sequence[Arm]) -> None:
        """Merge the first adapter of each arm, if that is to be measured."""
        if not self.layout.compare.merge:
            return
        self.base.release()
        for arm in arms:
            for run in self.layout.results(arm)[:1]:
                if run.config.method != "full" and arm.trained and run.folder.merges is None:
                    self._attempt(run, self._merge)

    def _attempt(self, run: PlannedRun, action: Callable[[PlannedRun], None]) -> None:
        if run.folder.failure is not None:
            return
        try:
            action(run)
        except Exception as error:  # whatever it is, the other arms go on, and it is told at the end
            run.folder.fail(Failure.of(error))
            if not isinstance(error, UserError):
                write_text(run.folder.path / "error.txt", traceback.format_exc())
            self.console.print(f"failed: {error}", style="red", markup=False)
        finally:
            self.base.take_back()

    def _train(self, run: PlannedRun) -> None:
        folder = run.folder
        if folder.trained:
            return
        self.console.rule(f"arm {run.title}", style="dim", align="left")
        resume = folder.can_resume
        folder.begin()
        self.base.on_ready = lambda ready: self._before_training(run, ready)
        result = run_training(run.config, resume=resume, quiet=self.quiet, resources=self.base)
        self.meter.end("train")
        memory = [self.meter.phases[name] for name in ("load", "train") if name in self.meter.phases]
        folder.finish_training(trained(result, memory, self.energy.stop()))

    def _before_training(self, run: PlannedRun, ready: Run) -> None:
        """Measure what the run starts from, where that is not what its base gives."""
        if ready.state.step == 0 and not (leaves_base(run.config) and starts_at_base(run.config)):
            assert isinstance(ready.loss_module, CausalLMLoss)
            run.folder.note_before(self._losses(run, ready.loaded, ready.loss_module))
        self.meter.begin()
        self.energy.start()

    def _measure(self, run: PlannedRun) -> None:
        """Measure the saved result on the test rows."""
        done = run.folder.trained
        if done is None or self._is_measured(run):
            return
        run.folder.begin_measuring()
        result, before = run.folder.path / str(done.result), run.folder.sums_before
        if not leaves_base(run.config):
            self._finish(run, load_result(run, result), before=before or ())
            return
        loaded = self.base.borrow(lambda: self._load(run))
        before = before or self._of_base(run, loaded)
        attach_adapter(loaded.model, read_adapter(result))
        self._finish(run, loaded, before=before)

    def _measure_base(self, run: PlannedRun) -> None:
        if self._is_measured(run):
            return
        self.console.rule(f"arm {run.title}", style="dim", align="left")
        run.folder.begin()
        loaded = self.base.borrow(lambda: self._load(run))
        total, disk = count_parameters(loaded.model).total, loaded.checkpoint.total_bytes
        data, memory = self._rows(run).data.report, (self.meter.phases["load"],)
        run.folder.finish_training(
            Trained(loaded.storage, 0, total, loaded.weight_bytes, disk, data.rows, data.tokens, memory=memory)
        )
        self._finish(run, loaded, before=self._of_base(run, loaded))

    def _of_base(self, run: PlannedRun, loaded: LoadedModel) -> tuple[float, ...]:
        """The test rows by the model without adapters, measured once."""
        if not self.sums_before:
            self.sums_before = self._losses(run, loaded)
        return self.sums_before

    def _losses(self, run: PlannedRun, loaded: LoadedModel, losses: CausalLMLoss | None = None) -> tuple[float, ...]:
        with self.meter.phase("evaluate"):
            return tuple(row_losses(loaded, self._rows(run).test, batch_size=_batch(run), losses=losses))

    def _finish(self, run: PlannedRun, loaded: LoadedModel, *, before: tuple[float, ...]) -> None:
        rows, how = self._rows(run), how_measured(self.layout, run)
        asked = rows.test[: how["samples"]]
        prompts, expected = questions(loaded, asked) if asked else ((), ())
        sums = self._losses(run, loaded) if run.arm.trained else before
        run.folder.finish_measuring(
            Measured(
                how,
                tuple(example.target_tokens for example in rows.test),
                tuple(example.target_tokens for example in rows.data.validation),
                rows.test_source,
                rows.validation_source,
                sums,
                before,
                memory=(self.meter.phases["evaluate"],),
                prompts=prompts,
                expected=expected,
                answers=answers(loaded, asked, max_new_tokens=how["sample_tokens"]) if asked else (),
            )
        )

    def _merge(self, run: PlannedRun) -> None:
        done = run.folder.trained
        if done is None or done.result is None:
            return
        self.console.rule(f"merging arm {run.title}", style="dim", align="left")
        folder, rows = run.folder.path, self._rows(run)
        run.folder.begin_measuring()
        adapter = folder / done.result
        run.folder.finish_merging(merge_results(run.config.model, adapter, rows.test, folder, batch_size=_batch(run)))

    def _is_measured(self, run: PlannedRun) -> bool:
        measured = run.folder.measured
        return measured is not None and measured.how == how_measured(self.layout, run)

    def _rows(self, run: PlannedRun) -> ComparedRows:
        return self.base.rows(run.config)

    def _load(self, run: PlannedRun) -> LoadedModel:
        storage = resolve_storage(run.config.model.storage, run.config.method)
        return load_for_inference(run.config.model.model_copy(update={"storage": storage}), progress=self._show_bars)

    @property
    def _show_bars(self) -> bool:
        return self.console.is_terminal and not self.quiet


def load_result(run: PlannedRun, result: Path) -> LoadedModel:
    """What a run saved, read as whoever uses it would."""
    model = run.config.model
    if run.config.method == "full":
        return load_for_inference(model.model_copy(update={"name": str(result), "revision": None, "storage": "auto"}))
    return load_for_inference(model, result)


def _is_done(layout: Layout, run: PlannedRun) -> bool:
    folder: RunFolder = run.folder
    if folder.failure:
        return True
    measured = folder.measured
    merges = layout.compare.merge and run.arm.trained and run.config.method != "full"
    is_first = run.config.train.seed == layout.seeds[0]
    is_merged = not merges or not is_first or folder.merges is not None
    return measured is not None and measured.how == how_measured(layout, run) and is_merged


def _batch(run: PlannedRun) -> int:
    return run.config.train.batch_size
