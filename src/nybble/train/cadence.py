"""The steps of a run with what happens between them: show, log, evaluate, save, stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from nybble.config import RunConfig
from nybble.data.collate import Batch
from nybble.data.example import Example
from nybble.data.prepare import PreparedData
from nybble.errors import TrainingStopped
from nybble.models.device import compute_device
from nybble.models.load import LoadedModel
from nybble.train.course import Course, evaluation_batches, training_batches
from nybble.train.evaluate import evaluate
from nybble.train.interrupt import StopSignals, TrainingInterrupted
from nybble.train.loop import StepResult, step_executor, training_steps
from nybble.train.memory_report import MemoryReport
from nybble.train.out_of_memory import explain_out_of_memory
from nybble.train.preflight import Preflight, count_checkpoints, preflight
from nybble.train.progress import TrainingProgress
from nybble.train.record import RunRecord
from nybble.train.retry import RetryingStep
from nybble.train.state import (
    Evaluation,
    RunState,
    Training,
    check_same_settings,
    checkpoint_name,
    newest_checkpoint,
    read_state,
    restore,
    save_checkpoint,
)
from nybble.train.trackers import Trackers
from nybble.train.window import Shapes


@dataclass
class Run:
    """A run that is ready to go, at `state.step`. loss_module: as it is called, wrapped or sharded if need be.

    window_bytes, suggest: what the planner knows, as `step_executor` takes them. memory_report: the file for a page
    about the memory of one step, if there is to be one.
    """

    config: RunConfig
    output: Path
    loaded: LoadedModel
    data: PreparedData
    course: Course
    loss_module: nn.Module
    training: Training
    state: RunState
    last_checkpoint: Path | None = None
    window_bytes: Callable[[Shapes], int] | None = None
    suggest: Callable[[], str] | None = None
    memory_report: Path | None = None

    @property
    def device(self) -> torch.device:
        return compute_device(self.loss_module)

    @property
    def pad_token_id(self) -> int:
        # Padding carries no loss and no token sees it: any token will do.
        return self.loaded.tokenizer.pad_token_id or 0

    def batches(self) -> Iterator[Batch]:
        """The training micro-batches that are still to come."""
        return training_batches(
            self.data.train,
            self.config.train,
            self.course,
            first_step=self.state.step,
            pad_token_id=self.pad_token_id,
        )

    def restore(self) -> list[str]:
        """Go back to the newest whole checkpoint; returns what there is to say about it.

        Raises UserError when settings that alter the run have changed since.
        """
        folder, notes = newest_checkpoint(self._folder)
        notes = [f"skipped a broken checkpoint: {note}" for note in notes]
        if folder is None:
            return [*notes, "no checkpoint yet: starting from the first step"]
        saved = read_state(folder)
        check_same_settings(saved, self.state.settings, where=folder)
        restore(folder, self.training)
        self.state, self.last_checkpoint = saved, folder
        return [*notes, f"resumed from {folder}"]

    def check(self, final_bytes: int, start_bytes: int) -> Preflight:
        """The preflight of this run; raises UserError if it would be useless. Both bytes: see `Trainable`."""
        with explain_out_of_memory(self.config, self.device, during="the check of one batch", suggest=self.suggest):
            return preflight(
                self.loss_module,
                {name: p for name, p in self.training.module.named_parameters() if p.requires_grad},
                next(chain(self.batches(), self._rows(self.data.train))).to(self.device),
                output=self.output,
                final_bytes=final_bytes,
                start_bytes=start_bytes,
                num_checkpoints=count_checkpoints(self.course.total_steps, self.config.train),
                may_overflow=self.training.scaler is not None,
            )

    def train(self, record: RunRecord, progress: TrainingProgress, trackers: Trackers, signals: StopSignals) -> None:
        """Take all steps that are left, and leave a checkpoint of the last one.

        Raises TrainingInterrupted after a signal, TrainingStopped when going on makes no sense.
        """
        watchers = (record, progress, trackers)
        total = self.course.total_steps
        if self.state.step == 0:
            self._evaluate(watchers)
        report = self._memory_report()
        for result in self._steps():
            self.state = replace(self.state, step=result.step)
            if report is not None:
                report.after(result)
            for watcher in watchers:
                watcher.step(result)
            improved = self._is_due(self.config.train.eval_every) and self._evaluate(watchers)
            if improved or self._is_due(self.config.train.save_every):
                self._save()
            if result.step < total and signals.came(self.device):
                raise TrainingInterrupted(result.step, self._save())
        self._evaluate(watchers)
        self._save()
        self._return_to_best(progress)

    def _steps(self) -> Iterator[StepResult]:
        try:
            yield from training_steps(
                self.loss_module,
                self.batches(),
                self.training.optimizer,
                self.config,
                total_steps=self.course.total_steps,
                first_step=self.state.step,
                scaler=self.training.scaler,
                executor=self._executor,
            )
        except TrainingStopped as stopped:
            kept = (
                f"The last good checkpoint is {self.last_checkpoint}."
                if self.last_checkpoint
                else "No checkpoint was saved yet."
            )
            raise type(stopped)(stopped.what, where=stopped.where, fix=f"{stopped.fix}\n{kept}") from None

    def _memory_report(self) -> MemoryReport | None:
        if self.memory_report is None:
            return None
        title = f"Memory of a step: {self.config.method} of {self.config.model.name}"
        return MemoryReport(self._executor.eager, self.memory_report, title=title, last_step=self.course.total_steps)

    @cached_property
    def _executor(self) -> RetryingStep:
        """Made when it is first used: after the check, and what the run restores."""
        training = self.training
        return step_executor(
            self.loss_module,
            training.optimizer,
            self.config,
            training.scaler,
            window_bytes=self.window_bytes,
            suggest=self.suggest,
        )

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.state.step % every == 0

    def _evaluate(self, watchers: tuple[RunRecord, TrainingProgress, Trackers]) -> bool:
        """Measure the held-out loss where there are rows for it, once a step; whether it is the best so far."""
        if not self.data.validation or any(done.step == self.state.step for done in self.state.evaluations):
            return False
        held_out = self.data.validation
        loss = self._executor.beside("evaluation", lambda: evaluate(self.loss_module, self._rows(held_out)).loss)
        evaluation = Evaluation(self.state.step, loss)
        self.state = replace(self.state, evaluations=(*self.state.evaluations, evaluation))
        for watcher in watchers:
            watcher.evaluation(evaluation)
        return self.state.best == evaluation

    def _rows(self, examples: Sequence[Example]) -> Iterator[Batch]:
        return evaluation_batches(examples, self.config.train.batch_size, pad_token_id=self.pad_token_id)

    def _return_to_best(self, progress: TrainingProgress) -> None:
        """Put back the weights of the best evaluation, if a later one was worse."""
        best = self.state.best
        if best is None or best.step == self.state.step:
            return
        self.training.weights.load(self._folder / checkpoint_name(best.step))
        progress.say(f"step {best.step} had the lowest held-out loss ({best.loss:.4f}): its weights are the result")

    @property
    def _folder(self) -> Path:
        return self.output / "checkpoints"

    def _save(self) -> Path:
        if self.last_checkpoint is None or self.last_checkpoint.name != checkpoint_name(self.state.step):
            keep = self.config.train.keep_checkpoints
            self.last_checkpoint = save_checkpoint(self._folder, self.training, self.state, keep=keep)
        return self.last_checkpoint
