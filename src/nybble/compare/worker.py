"""The runs of arms that may share a base, one after another in one process; what each gives is in its folder."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from rich.console import Console

from nybble.adapters.io import attach_adapter
from nybble.adapters.report import count_parameters
from nybble.adapters.saved import read_adapter
from nybble.compare.config import Arm
from nybble.compare.folder import Failure, Measured, Trained
from nybble.compare.layout import Layout, PlannedRun
from nybble.compare.measure import AskedRows, merge_results
from nybble.compare.outcome import trained
from nybble.compare.peaks import EnergyMeter, Meter
from nybble.compare.resident import ResidentBase, base_key, leaves_base, starts_at_base
from nybble.compare.rows import ComparedRows
from nybble.data.example import Example
from nybble.errors import UserError
from nybble.evaluation.held_out import row_losses
from nybble.evaluation.progress import counted
from nybble.files import write_text
from nybble.inference import load_for_inference
from nybble.models.dtypes import resolve_device, resolve_storage
from nybble.models.load import LoadedModel
from nybble.models.loss import CausalLMLoss
from nybble.train.run import run_training
from nybble.units import plural

if TYPE_CHECKING:
    from nybble.train.cadence import Run


def run_arms(layout: Layout, arms: Sequence[Arm], *, quiet: bool = False) -> None:
    """Do what is left to do of `arms`, which have one `base_key`; failures are kept in their folders."""
    worker = Worker(layout, quiet=quiet)
    for arm in arms:
        worker.run(arm)
    worker.merge(arms)


def by_base(layout: Layout) -> list[list[Arm]]:
    """Arms that have something left to do, those of one base together; the base's own arm first among them."""
    left = [arm for arm in layout.compare.arms if not is_finished(layout, arm)]

    def key(arm: Arm) -> str:
        return base_key(layout.config(arm))

    order = list(dict.fromkeys(map(key, left)))
    together = sorted(left, key=lambda arm: (order.index(key(arm)), arm.trained))
    return [list(arms) for _, arms in groupby(together, key)]


def is_finished(layout: Layout, arm: Arm) -> bool:
    """Whether nothing of `arm` is left to do, failures aside."""
    swept = layout.sweep(arm)
    if len(swept) > 1 and len(layout.swept(arm)) < len(swept):
        return False
    return all(_is_done(layout, run) for run in layout.results(arm))


class Worker:
    def __init__(self, layout: Layout, *, quiet: bool) -> None:
        self.layout = layout
        self.quiet = quiet
        self.console = Console(stderr=True, quiet=quiet, soft_wrap=True, highlight=False)
        self.meter = Meter(resolve_device())
        self.energy = EnergyMeter(self.meter.device)
        self.base = ResidentBase(self.meter, test=layout.compare.test, chooses=layout.chooses)
        self.sums_of_base: tuple[float, ...] = ()

    def run(self, arm: Arm) -> None:
        """Try the arm's learning rates, then train and measure each seed at the best of them."""
        if len(swept := self.layout.sweep(arm)) > 1:
            for run in swept:
                self._attempt(run, self._train)
                self._attempt(run, self._evaluate)
        for run in self.layout.results(arm):
            if arm.trained:
                self._attempt(run, self._train)
            self._attempt(run, self._measure if arm.trained else self._measure_base)

    def merge(self, arms: Sequence[Arm]) -> None:
        """Merge the first adapter of each arm, if that is to be measured."""
        results = [run for arm in arms for run in self.layout.results(arm)]
        if left := [run for run in results if self.layout.merges(run) and run.folder.merges is None]:
            self.base.release()
        for run in left:
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
        self.energy.reset()
        resume = folder.can_resume
        folder.begin(self.layout.contents(run.arm))
        self.base.on_ready = lambda ready: self._before_training(run, ready)
        result = run_training(run.config, resume=resume, quiet=self.quiet, resources=self.base)
        self.meter.end("train")
        memory = [self.meter.phases[name] for name in ("load", "train") if name in self.meter.phases]
        folder.finish_training(trained(result, memory, self.energy.stop()))

    def _before_training(self, run: PlannedRun, ready: Run) -> None:
        """Measure what the run starts from, where that is not what its base gives."""
        if ready.state.step == 0 and not (leaves_base(run.config) and starts_at_base(run.config)):
            assert isinstance(ready.loss_module, CausalLMLoss)
            rows = self._rows(run).test
            sums = self._losses(run, ready.loaded, rows, "test rows", "before training", ready.loss_module)
            run.folder.note_before(rows, sums)
        self.meter.begin()
        if ready.state.step == 0:
            self.energy.start()

    def _evaluate(self, run: PlannedRun) -> None:
        """Measure on the rows that choose what was trained without them, when there was one learning rate alone."""
        done = run.folder.trained
        if done is None or done.evaluated:
            return
        run.folder.begin_measuring()
        rows = self._rows(run).data.validation
        sums = self._losses(run, self._load_trained(run, done), rows, "validation rows", "after training")
        loss = sum(sums) / sum(example.target_tokens for example in rows)
        curve = replace(done.curve, validation_steps=(done.steps,), validation_losses=(loss,))
        lowest = loss if math.isfinite(loss) else None
        run.folder.finish_training(replace(done, validation_loss=lowest, curve=curve))

    def _measure(self, run: PlannedRun) -> None:
        """Measure the saved result on the test rows."""
        done = run.folder.trained
        if done is None or self.layout.measured(run):
            return
        run.folder.begin_measuring()
        before = run.folder.sums_before(self._rows(run).test)
        if leaves_base(run.config) and starts_at_base(run.config):
            before = self._of_base(run, self.base.borrow(lambda: self._load(run)))
        self._finish(run, self._load_trained(run, done), before=before or ())

    def _load_trained(self, run: PlannedRun, done: Trained) -> LoadedModel:
        """The saved result of `run`, its adapter on the base that is in memory if it leaves that as it is."""
        result = run.folder.path / str(done.result)
        if not leaves_base(run.config):
            return load_result(run, result)
        loaded = self.base.borrow(lambda: self._load(run))
        attach_adapter(loaded.model, read_adapter(result))
        return loaded

    def _measure_base(self, run: PlannedRun) -> None:
        if self.layout.measured(run):
            return
        self.console.rule(f"arm {run.title}", style="dim", align="left")
        run.folder.begin(self.layout.contents(run.arm))
        loaded = self.base.borrow(lambda: self._load(run))
        total, disk = count_parameters(loaded.model).total, loaded.checkpoint.total_bytes
        data, memory = self._rows(run).data.report, (self.meter.phases["load"],)
        run.folder.finish_training(
            Trained(loaded.storage, 0, total, loaded.weight_bytes, disk, data.rows, data.tokens, memory=memory)
        )
        run.folder.begin_measuring()
        self._finish(run, loaded, before=self._of_base(run, loaded))

    def _of_base(self, run: PlannedRun, loaded: LoadedModel) -> tuple[float, ...]:
        """The test rows by the model without adapters, measured once."""
        if not self.sums_of_base:
            self.sums_of_base = self._losses(run, loaded, self._rows(run).test, "test rows", "by the base alone")
        return self.sums_of_base

    def _losses(
        self,
        run: PlannedRun,
        loaded: LoadedModel,
        rows: Sequence[Example],
        named: str,
        when: str,
        losses: CausalLMLoss | None = None,
    ) -> tuple[float, ...]:
        self.console.print(f"{run.title}: measuring {len(rows)} {named} {when}", markup=False)
        with self.meter.phase("evaluate"), counted(named, len(rows), progress=self._show_bars) as done:
            return tuple(row_losses(loaded, rows, batch_size=_batch(run), done=done, losses=losses))

    def _finish(self, run: PlannedRun, loaded: LoadedModel, *, before: tuple[float, ...]) -> None:
        rows, compare = self._rows(run), self.layout.compare
        sums = before
        if run.arm.trained:
            sums = self._losses(run, loaded, rows.test, "test rows", "after training")
        _require_finite(run, sums)
        asked = AskedRows.of_rows(rows.test, loaded.tokenizer, compare.samples)
        prompts, expected = asked.texts(loaded.tokenizer)
        measured = Measured(
            self.layout.how_measured,
            tuple(example.target_tokens for example in rows.test),
            tuple(example.target_tokens for example in rows.data.validation),
            rows.test_source,
            rows.validation_source,
            sums,
            before,
            memory=(self.meter.phases["evaluate"],),
            prompts=prompts,
            expected=expected,
            answers=self._answers(run, loaded, asked),
            scored=asked.scored,
            duplicates=rows.duplicates,
        )
        run.folder.finish_measuring(measured)
        figures = {"held-out loss": measured.loss} | {name: fmean(found) for name, found in measured.scores.items()}
        self.console.print(", ".join(f"{name} {value:.4f}" for name, value in figures.items()))

    def _answers(self, run: PlannedRun, loaded: LoadedModel, asked: AskedRows) -> tuple[str, ...]:
        template, most = self._rows(run).data.chat_template, self.layout.compare.sample_tokens
        with counted("answers", len(asked), progress=self._show_bars) as done:
            return asked.ask(loaded, chat_template=template, max_new_tokens=most, done=done)

    def _merge(self, run: PlannedRun) -> None:
        done = run.folder.trained
        if done is None or done.result is None:
            return
        self.console.rule(f"merging arm {run.title}", style="dim", align="left")
        folder, rows = run.folder.path, self._rows(run)
        run.folder.begin_measuring()
        adapter = folder / done.result
        run.folder.finish_merging(
            merge_results(
                run.config.model,
                adapter,
                rows.test,
                folder,
                batch_size=_batch(run),
                progress=self._show_bars,
            )
        )

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


def _require_finite(run: PlannedRun, sums: Sequence[float]) -> None:
    """No interval holds a mean that is not finite, so this run has no result. Other test rows may well have one."""
    if math.isfinite(sum(sums)):
        return
    rows = sum(not math.isfinite(loss) for loss in sums)
    what = f"the held-out loss is {sum(sums)}: it is not finite on {rows} of {plural(len(sums), 'row')}"
    lower = ", or try a lower learning rate" if run.arm.trained else ""
    raise UserError(what, where="test rows", fix=f"Set model.compute=fp32, whose range is the widest{lower}.")


def _is_done(layout: Layout, run: PlannedRun) -> bool:
    if run.folder.failure:
        return True
    is_merged = not layout.merges(run) or run.folder.merges is not None
    return layout.measured(run) is not None and is_merged


def _batch(run: PlannedRun) -> int:
    return run.config.train.batch_size
