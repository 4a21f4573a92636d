"""What of a run's settings memory and time follow from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nybble.planner.shapes import ModelShape
from nybble.quant.format import NF4Spec

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True)
class RunShape:
    """A run's sizes. batch: sequences a micro-batch; accumulation: micro-batches an optimizer step.

    targets: names of the adapted linears; those that a model does not have count for nothing.
    samples_a_row: as FusedBody takes it, 1 for rows that are not packed. storage_bytes: of a weight that is not
    quantized (embedding, head; for lora and full all). nf4_head: the head is, whatever the method, and then it is not
    tied. trained_bytes: of a value that is trained. fused: by fused kernels where the model has them. evaluation_len:
    of the longest held-out row, as many of which are evaluated at a time as are trained on; 0: nothing is evaluated.
    """

    method: Literal["lora", "qlora", "full"] = "qlora"
    targets: tuple[str, ...] = ALL_LINEAR
    rank: int = 16
    batch: int = 1
    seq_len: int = 2048
    accumulation: int = 1
    samples_a_row: int = 1
    precision: Literal["bf16", "fp8"] = "bf16"
    state_bits: Literal[32, 8] = 32
    nf4: NF4Spec = field(default_factory=NF4Spec)
    storage_bytes: int = 2
    nf4_head: bool = False
    compute_bytes: int = 2
    trained_bytes: int = 4
    cuda_graph: bool = True
    fused: bool = True
    deterministic: bool = False
    evaluation_len: int = 0

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.batch * self.seq_len

    @property
    def tokens_a_step(self) -> int:
        return self.tokens * self.accumulation

    def is_fused(self, model: ModelShape) -> bool:
        return self.fused and model.fused and self.method != "full"
