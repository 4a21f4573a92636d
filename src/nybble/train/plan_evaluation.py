"""How a model will be held that is measured or asked: decided as a run's plan is, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nybble.adapters.config import LoraConfig
from nybble.config import RunConfig
from nybble.errors import UserError
from nybble.planner.candidates import Choices
from nybble.planner.cards import DeviceSpec
from nybble.planner.evaluation import Held, Measuring, Sequences
from nybble.planner.reach import Reach, reach
from nybble.planner.run_shape import RunShape
from nybble.planner.shapes import ModelShape
from nybble.planner.sizes import Sizes
from nybble.planner.words import PHASES
from nybble.train.plan import TOLERANCE, budget_of, choices, num_layers_of, shape_of, spared, unplanned
from nybble.units import format_bytes

_PLACES = ("weights", "embedding", "head")  # of the memory settings, those that mean something without training
_MIB = 2**20


def plan_evaluation(
    config: RunConfig,
    model: Mapping[str, Any],
    card: DeviceSpec,
    run: RunShape,
    work: Sequence[Sequences],
    *,
    lora: LoraConfig | None = None,
    in_files: bool,
    on_gpu: bool = True,
) -> Held:
    """How `config.memory` lets a model with this config.json be held while `work` goes through it.

    run: how its weights are stored and computed with. lora: of the adapter on it. in_files: whether the checkpoint's
    files hold the weights so. Raises UserError if that needs more than there is; on a CPU, than it was given.
    """
    shape, memory = shape_of(model), config.memory
    if shape is None:
        plain = memory.model_copy(update={"activations": "keep", "moments": "resident"})
        return Held(unplanned(plain, num_layers_of(model)))
    reached = reach(shape, lora) if lora else Reach((), 0, 0, ends_trained=False)
    run = replace(run, targets=reached.targets, rank=reached.rank)
    end = "device" if reached.ends_trained else "auto"
    head = "device" if config.model.head == "nf4" else end
    required = Choices(embedding=end, head=head, in_files=in_files)  # type: ignore[arg-type]  # both are its literals
    fixed = choices(config, shape, required)
    limit = spared(fixed, card).budget_bytes if on_gpu or memory.budget_bytes is not None else None
    asked = Measuring(Sizes(shape, run), card, work, fixed, limit)
    held = asked.fastest()
    if limit is not None and not _may_fit(held, fixed, card):
        free = replace(asked, fixed=choices(_with_free_places(config), shape, required))
        raise _does_not_fit(held, fixed, card, _changes(config, free, shape))
    return held


def _may_fit(held: Held, fixed: Choices, card: DeviceSpec) -> bool:
    """Whether it fits, or lacks less than predictions err."""
    return held.device_bytes <= TOLERANCE * budget_of(fixed, card) and held.host_bytes <= card.host_bytes


def _with_free_places(config: RunConfig) -> RunConfig:
    return config.changed({f"memory.{name}": "auto" for name in _PLACES})


def _changes(config: RunConfig, free: Measuring, shape: ModelShape) -> dict[str, Held]:
    """What the settings may be changed to, the smallest change first; free: with nothing fixed that can be chosen."""
    fixed = [f"memory.{name}=auto" for name in _PLACES if getattr(config.memory, name) != "auto"]
    found = {" ".join(fixed): free.fastest()} if fixed else {}
    if free.sizes.run.method != "qlora":
        in_nf4 = replace(free, sizes=Sizes(shape, replace(free.sizes.run, method="qlora")))
        in_nf4 = replace(in_nf4, fixed=replace(free.fixed, in_files=False))
        found[" ".join([*fixed, "model.storage=nf4"])] = in_nf4.fastest()
    return {change: held for change, held in found.items() if _may_fit(held, free.fixed, free.card)}


def _does_not_fit(held: Held, fixed: Choices, card: DeviceSpec, changes: Mapping[str, Held]) -> UserError:
    budget_bytes, lacking = budget_of(fixed, card), []
    if held.device_bytes > TOLERANCE * budget_bytes:
        needed, there = format_bytes(held.device_bytes), format_bytes(budget_bytes)
        lacking.append(f"{_phase(held)} would need {needed}, and there are {there}")
    if held.host_bytes > card.host_bytes:
        needed, there = format_bytes(held.host_bytes), format_bytes(card.host_bytes)
        lacking.append(f"it would need {needed} of host memory, and there are {there}")
    elif held.device_bytes <= card.memory_bytes:
        changes = {**changes, f"memory.budget={math.ceil(held.device_bytes / _MIB)}MiB": held}
    what = f"the model does not fit: {'; '.join(lacking)}"
    if not changes:
        return UserError(what, where="memory", fix="Take a smaller model, or a machine with more.")
    change, found = next(iter(changes.items()))
    fix = f"The smallest change that fits: {change} ({format_bytes(found.device_bytes)})"
    return UserError(what, where="memory", fix=fix)


def _phase(held: Held) -> str:
    """The one that needs the most."""
    return PHASES[max(held.phases, key=lambda name: held.phases[name].device_bytes)]
