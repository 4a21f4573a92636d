"""The settings of a LoRA adapter, by the names that PEFT gave them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from nybble.settings import Section

Init = Literal["plain", "calibrated", "pissa", "loftq"]


class LoraConfig(Section):
    r: int = Field(default=16, ge=1, description="rank")
    lora_alpha: float = Field(default=32, gt=0, description="scaling = lora_alpha / r, or / sqrt(r) with use_rslora")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="of the adapter's inputs while training")
    use_rslora: bool = Field(default=False, description="scaling by the root of the rank (rsLoRA)")
    use_dora: bool = Field(default=False, description="train the magnitude of each row of the weight as well (DoRA)")
    target_modules: str | tuple[str, ...] = Field(
        default="all-linear",
        description="all-linear (without lm_head), attention (q, k, v, o), names, or one regular expression",
    )
    exclude_modules: str | tuple[str, ...] = Field(
        default=(), description="names, or one regular expression, to leave out"
    )
    rank_pattern: dict[str, int] = Field(default_factory=dict, description="rank by module name or regular expression")
    alpha_pattern: dict[str, float] = Field(default_factory=dict, description="lora_alpha in the same way")
    modules_to_save: tuple[str, ...] = Field(default=(), description="modules trained whole and saved with the adapter")
    dtype: Literal["fp32", "bf16"] = Field(
        default="fp32", description="how the adapter's weights are held while training"
    )
    init: Init = Field(
        default="plain",
        description="where it begins. plain: at zero; calibrated: at the correction that a folder "
        "prepared with --calibration brings; pissa, loftq: at a part of the weights, which is taken out of the base",
    )
    save_as: Literal["trained", "difference"] = Field(
        default="trained",
        description="difference: what training changed, as an adapter of twice the rank for the checkpoint itself",
    )

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _positive(cls, pattern: dict[str, float]) -> dict[str, float]:
        bad = [f"{key}: {value}" for key, value in pattern.items() if value <= 0]
        if bad:
            raise ValueError(f"ranks and alphas are above 0, not {', '.join(bad)}")
        return pattern

    @field_validator("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")
    @classmethod
    def _valid_expressions(cls, value: Any) -> Any:
        for expression in [value] if isinstance(value, str) else value:
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(f"{expression!r} is not a regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _dora_begins_at_zero(self) -> Self:
        if self.use_dora and self.init != "plain":
            raise ValueError(f"use_dora rescales the base together with its adapter, which init {self.init} changes")
        if self.use_dora and self.save_as == "difference":
            raise ValueError("use_dora rescales the base too, so what it changed is no low-rank difference")
        return self

    @property
    def scaling(self) -> float:
        """The factor of B A x: lora_alpha / r, or lora_alpha / sqrt(r) for rank-stabilized LoRA (arXiv 2312.03732)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def at(self, path: str) -> LoraConfig:
        """The settings for the layer at `path`: its own rank and alpha where a pattern names it."""
        r = self.rank_pattern.get(matching_pattern(self.rank_pattern, path) or "", self.r)
        alpha = self.alpha_pattern.get(matching_pattern(self.alpha_pattern, path) or "", self.lora_alpha)
        return self.model_copy(update={"r": r, "lora_alpha": alpha})


def matching_pattern(patterns: Iterable[str], path: str) -> str | None:
    """The first pattern that matches the end of `path` from a dot on, as PEFT reads rank_pattern and alpha_pattern."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", path)), None)
