"""The settings of a LoRA adapter, by the names that PEFT gave them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nybble.settings import Section


class LoraConfig(Section):
    r: int = Field(16, ge=1, description="rank")
    lora_alpha: float = Field(32, gt=0, description="scaling = lora_alpha / r, or / sqrt(r) with use_rslora")
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: str | tuple[str, ...] = Field(
        "all-linear",
        description="'all-linear' (without lm_head), 'attention' (q, k, v, o), names of modules, or one regular expression",
    )
    exclude_modules: str | tuple[str, ...] = Field((), description="names, or one regular expression, to leave out")
    rank_pattern: dict[str, int] = Field(default_factory=dict, description="rank by module name or regular expression")
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    modules_to_save: tuple[str, ...] = Field((), description="modules trained whole and saved with the adapter")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="how the adapter's weights are held while training")

    def scaling(self, r: int, lora_alpha: float) -> float:
        return lora_alpha / r**0.5 if self.use_rslora else lora_alpha / r
