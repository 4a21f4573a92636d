"""Which model, how its weights are stored, and in what precision it computes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nybble.quant.format import BlockSize
from nybble.settings import Section

Storage = Literal["auto", "bf16", "fp16", "fp32", "nf4"]
Compute = Literal["auto", "bf16", "fp16", "fp32"]


class ModelConfig(Section):
    name: str = Field(min_length=1, description="checkpoint folder, or model id on the Hugging Face hub")
    revision: str | None = Field(default=None, description="branch, tag or commit of a model on the hub")
    trust_remote_code: bool = Field(default=False, description="run the Python code that comes with the checkpoint")
    storage: Storage = Field(
        default="auto",
        description="how frozen weights are held; auto: nf4 for qlora, fp32 for full, else as the checkpoint has them",
    )
    compute: Compute = Field(
        default="auto", description="precision of the arithmetic; auto: the best that the device has"
    )
    block_size: BlockSize = Field(default=64, description="weights per NF4 scale")
    double_quant: bool = Field(default=True, description="hold NF4's scales in 8 bits")
    rounding: Literal["nearest", "search"] = Field(
        default="nearest", description="how NF4's scales are chosen while loading: as bitsandbytes, or for least error"
    )
    head: Literal["auto", "16bit", "nf4"] = Field(
        default="auto",
        description="how a frozen output head is held; 16bit: as the checkpoint has it; auto: so too, or under an "
        "adapter as it was trained",
    )
    attention: Literal["auto", "eager", "sdpa", "flex_attention", "flash_attention_2"] = Field(
        default="auto", description="by Transformers' names, where stock modules compute; auto: sdpa where it can be"
    )
