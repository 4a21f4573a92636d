"""LoRA or QLoRA: what each needs and costs on a card, and which to take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from nybble.planner.prediction import Prediction
from nybble.planner.solve import Solution

Method = Literal["lora", "qlora"]

# Held-out loss of QLoRA has been 2.4 % above LoRA's (SmolLM2-135M): less speed than this is not worth it.
_WORTH = 1.1
_NO_BYTES, _ENDLESS_BYTES = 1, 2**50


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


def advise(solve: Callable[[Method, int | None], Solution]) -> Advice:
    """Which of the two to take. solve: solution of the run by a method, within so many bytes or the card's own."""
    options: dict[Method, Option] = {}
    methods: tuple[Method, Method] = ("lora", "qlora")
    for method in methods:
        least, fastest = (solve(method, nbytes).prediction for nbytes in (_NO_BYTES, _ENDLESS_BYTES))
        options[method] = Option(solve(method, None), least, fastest)
    return Advice(options, *_choose(options))


def _choose(options: Mapping[Method, Option]) -> tuple[Method, str]:
    lora, qlora = options["lora"].here, options["qlora"].here
    ratio = qlora.prediction.tokens_per_second / lora.prediction.tokens_per_second
    if not qlora.fits and not lora.fits:
        return "qlora", "neither fits; QLoRA needs less"
    if not lora.fits:
        return "qlora", "LoRA's 16-bit weights do not fit here"
    if not qlora.fits or ratio <= 1:
        return "lora", "memory does not bind: 16-bit weights fit, are as fast, and lose nothing to quantization"
    if ratio < _WORTH:
        return "lora", f"memory hardly binds: QLoRA would be {ratio - 1:.0%} faster, and quantized weights cost quality"
    return "qlora", f"memory binds: with weights of 4 bits more of the rest fits, which makes it {ratio:.1f}x as fast"
