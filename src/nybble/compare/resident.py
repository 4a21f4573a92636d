"""A base that stays in memory while one run after another trains an adapter on it."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nybble.adapters.inject import adapter_slots, remove_adapters
from nybble.compare.peaks import Meter
from nybble.compare.rows import ComparedRows, prepare_rows
from nybble.config import RunConfig
from nybble.data.config import DataConfig
from nybble.data.prepare import PreparedData
from nybble.inference import open_for_inference
from nybble.models.checkpoint import Checkpoint
from nybble.models.device import compute_device
from nybble.models.dtypes import resolve_storage
from nybble.models.load import LoadedModel
from nybble.plan import MemoryPlan
from nybble.train.activation_checkpointing import disable_activation_checkpointing
from nybble.train.resources import Resources

if TYPE_CHECKING:
    from nybble.train.cadence import Run


def base_key(config: RunConfig) -> str:
    """Runs with the same key may train on one base, in one process, which has one cap on its device's memory.

    What trains the base's weights, or changes them, stands alone.
    """
    storage = resolve_storage(config.model.storage, config.method)
    kind = "adapters" if leaves_base(config) else config.model_dump_json(include={"method", "lora"})
    model = config.model.model_copy(update={"storage": storage})
    return f"{model.model_dump_json()} {config.memory.budget_bytes} {kind}"


def leaves_base(config: RunConfig) -> bool:
    """Whether a run leaves the weights as they are in the checkpoint, or as quantizing makes them."""
    return config.method != "full" and config.lora.init in ("plain", "calibrated")


def starts_at_base(config: RunConfig) -> bool:
    """Whether the model computes before the first step what its base does."""
    return config.method == "full" or config.lora.init == "plain"


class ResidentBase(Resources):
    """Hands out one base to runs of one `base_key`, after each of which `take_back` makes it what it was.

    test: where the rows for results are; chooses: whether held-out rows choose anything. ready: called with a run that
    stands before its next step.
    """

    def __init__(self, meter: Meter, *, test: str | None, chooses: bool) -> None:
        self.meter = meter
        self.test, self.chooses = test, chooses
        self.on_ready: Callable[[Run], None] = lambda _: None
        self._kept: LoadedModel | None = None
        self._bits: tuple[int, ...] = ()
        self._rows: dict[DataConfig, ComparedRows] = {}

    def rows(self, config: RunConfig) -> ComparedRows:
        """The rows of runs with these data, prepared once."""
        if config.data not in self._rows:
            self.prepare(config, *open_for_inference(config.model), progress=False)
        return self._rows[config.data]

    def prepare(
        self, config: RunConfig, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, *, progress: bool
    ) -> PreparedData:
        if config.data not in self._rows:
            self._rows[config.data] = prepare_rows(
                config.data,
                tokenizer,
                model_max_length=checkpoint.max_positions,
                test=self.test,
                chooses=self.chooses,
                progress=progress,
            )
        return self._rows[config.data].data

    def load(
        self,
        config: RunConfig,
        checkpoint: Checkpoint,
        tokenizer: PreTrainedTokenizerBase,
        *,
        plan: MemoryPlan,
        device: torch.device,
        progress: bool,
    ) -> LoadedModel:
        read = partial(super().load, config, checkpoint, tokenizer, plan=plan, device=device, progress=progress)
        if may_stay(config, plan):
            return dataclasses.replace(self.borrow(read), tokenizer=tokenizer)
        self.release()
        with self.meter.phase("load"):
            return read()

    def ready(self, run: Run) -> None:
        self.on_ready(run)

    def take_back(self) -> None:
        """A run is over, however it ended: leave nothing of it but the base, or not even that if its bits changed."""
        if self._kept is not None:
            restore_base(self._kept.model)
            if bits_of(self._kept.model) != self._bits:
                self._kept = None
        free_memory()

    def release(self) -> None:
        """Forget the base."""
        self._kept = None
        free_memory()

    def borrow(self, load: Callable[[], LoadedModel]) -> LoadedModel:
        """The base as it is, loaded by `load` unless it is here already; `take_back` is to be called afterwards."""
        if self._kept is None:
            with self.meter.phase("load"):
                self._kept = load()
            self._bits = bits_of(self._kept.model)
        return self._kept


def may_stay(config: RunConfig, plan: MemoryPlan) -> bool:
    """Whether a run that holds its model by `plan` leaves it as it found it."""
    at_home = plan.embedding == plan.head == "device" and not plan.streamed()
    return leaves_base(config) and at_home


def restore_base(model: PreTrainedModel) -> None:
    """Take off what a run put on: adapters, training mode, activation checkpointing."""
    if any(adapter_slots(model)):
        remove_adapters(model)
    disable_activation_checkpointing(model)
    model.requires_grad_(False).eval()


def bits_of(model: PreTrainedModel) -> tuple[int, ...]:
    """A sum over the bytes of every weight: one that changed shows, but for a chance of nothing that happens here."""
    device = compute_device(model)
    sums = [weight.detach().contiguous().view(torch.uint8).sum(dtype=torch.int64) for weight in model.parameters()]
    return tuple(torch.stack([value.to(device) for value in sums]).tolist())


def free_memory() -> None:
    gc.collect()  # losses, graphs and hooks know one another
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
