"""How weights are updated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from nybble.settings import Section

_Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    learning_rate: float = Field(default=2e-4, gt=0, description="the highest, after the warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="how the rate falls after the warm-up"
    )
    warmup_ratio: float = Field(
        default=0.03, ge=0, lt=1, description="share of the steps over which the rate rises from zero"
    )
    warmup_steps: int | None = Field(default=None, ge=0, description="overrides warmup_ratio")
    min_lr_ratio: float = Field(
        default=0.0, ge=0, le=1, description="share of the rate left at the end of linear and cosine"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="of matrices; never of biases, norms or DoRA magnitudes")
    betas: tuple[_Beta, _Beta] = Field(default=(0.9, 0.999), description="of AdamW's moments")
    eps: float = Field(default=1e-8, gt=0, description="added to the root of AdamW's second moment")
    state_bits: Literal[32, 8] = Field(
        default=32, description="of a value of AdamW's moments; 8: blockwise, a quarter of the memory"
    )
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="gradient norm is clipped to this; 0 turns clipping off"
    )
