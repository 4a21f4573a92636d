"""LoRA or QLoRA: what each needs and costs on a card, and which to take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from nybble.plan import MemoryPlan
from nybble.planner.cards import DeviceSpec
from nybble.planner.cost import predict
from nybble.planner.prediction import Prediction
from nybble.planner.shapes import ModelShape
from nybble.planner.solve import Solution

Method = Literal["lora", "qlora"]

# Held-out loss of QLoRA has been 2.4 % above LoRA's (SmolLM2-135M): less speed than this is not worth it.
_WORTH = 1.1
_CLOSE = 1.005
_ENDLESS_BYTES = 2**50


@dataclass(frozen=True)
class Option:
    """One method. here: on the card. least: by the plan that needs the least. fastest: with all the memory there is."""

    here: Solution
    least: Prediction
    fastest: Prediction


@dataclass(frozen=True)
class Advice:
    """options: both methods. why: a sentence."""

    options: Mapping[Method, Option]
    method: Method
    why: str


def advise(solve: Callable[[Method], Solution], model: ModelShape, device: DeviceSpec) -> Advice:
    """Which of the two to take; solve: the solution of the run by a method."""
    endless = device.with_memory(_ENDLESS_BYTES)
    options: dict[Method, Option] = {}
    methods: tuple[Method, Method] = ("lora", "qlora")
    for method in methods:
        here = solve(method)
        least = predict(model, here.run, device.with_memory(0), here.leanest)
        fastest = predict(model, here.run, endless, MemoryPlan.uniform(model.num_layers))
        options[method] = Option(here, least, fastest)
    return Advice(options, *_choose(options))


def _choose(options: Mapping[Method, Option]) -> tuple[Method, str]:
    lora, qlora = options["lora"].here, options["qlora"].here
    ratio = qlora.prediction.tokens_per_second / lora.prediction.tokens_per_second
    if not qlora.fits and not lora.fits:
        return "qlora", "neither fits, and it needs less"
    if not lora.fits:
        return "qlora", "16-bit weights do not fit here"
    streamed = ", streamed from the host," if lora.plan.streamed() else ""
    weights = f"its 16-bit weights{streamed} lose nothing to quantization"
    if not qlora.fits or ratio < _CLOSE:
        return "lora", f"{weights} and are as fast here"
    if ratio < _WORTH:
        return "lora", f"{weights}, and QLoRA would be only {ratio - 1:.0%} faster"
    return "qlora", f"memory binds here: weights of 4 bits leave room for the rest, which makes it {ratio:.1f}x as fast"
