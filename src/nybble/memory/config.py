"""Where a run holds what it needs. `auto` is for the planner, which picks the fastest that fits."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from nybble.settings import Section
from nybble.units import parse_bytes


class MemoryConfig(Section):
    budget: str = Field(
        default="all", description="of device memory, like 24GiB, everything counted; all: what is free"
    )
    activations: Literal["auto", "keep", "keep_matmuls", "keep_on_host", "recompute", "offload"] = Field(
        default="auto",
        description="between the passes: kept; kept but for what is quickly made again; that in host memory; "
        "recomputed from each block's input; or that input kept in host memory",
    )
    weights: Literal["auto", "resident", "streamed", "disk"] = Field(
        default="auto",
        description="of the blocks: on the device, or copied there from host memory or disk ahead of use",
    )
    embedding: Literal["auto", "device", "host"] = Field(
        default="auto", description="where its weight lies; host: rows are looked up in host memory"
    )
    head: Literal["auto", "device", "host"] = Field(
        default="auto", description="where its weight lies; host: it passes through the loss in chunks"
    )
    moments: Literal["auto", "resident", "paged"] = Field(
        default="auto", description="of the optimizer; paged: in host memory while they are not needed"
    )
    span: int = Field(
        default=0, ge=0, description="blocks recomputed together, from one input; 0: the planner's choice"
    )
    mlp_rows: int = Field(
        default=0, ge=0, description="tokens that go through a recomputed MLP at a time; 0: the planner's choice"
    )

    @field_validator("budget", mode="before")
    @classmethod
    def _is_amount(cls, budget: object) -> object:
        if budget != "all" and parse_bytes(str(budget)) <= 0:
            raise ValueError("must be more than nothing, like 24GiB, or all")
        return budget

    @property
    def budget_bytes(self) -> int | None:
        """None: all that is free."""
        return None if self.budget == "all" else parse_bytes(self.budget)
