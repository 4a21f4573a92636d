"""What a model says to held-out data, small enough to keep while another model takes its place in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nybble.data.collate import Batch
from nybble.models.attention import body_inputs
from nybble.models.device import compute_device
from nybble.models.loss import CausalLMLoss
from nybble.models.modes import evaluation_mode

# Logits are compared on this many tokens: 128 x 128k words in fp32 are 64 MB.
PROBE_TOKENS = 128


@dataclass(frozen=True)
class ModelOutputs:
    """Mean held-out loss in nats a target token, and the logits (tokens, vocabulary) of the first tokens, in fp32."""

    loss: float
    target_tokens: int
    logits: Tensor

    def logit_gap(self, other: ModelOutputs) -> float:
        """The largest difference between two logits for the same tokens."""
        return float((self.logits - other.logits).abs().max())


@torch.no_grad()
def measure_outputs(model: PreTrainedModel, batches: Iterable[Batch]) -> ModelOutputs:
    """Run `model`, in evaluation mode, over `batches`; the same ones in the same order for models to be compared."""
    device = compute_device(model)
    losses = CausalLMLoss(model)
    total, target_tokens, logits = 0.0, 0, torch.empty(0)
    with evaluation_mode(model):
        for number, batch in enumerate(batch.to(device) for batch in batches):
            total += float(losses(batch.input_ids, batch.labels, batch.position_ids))
            target_tokens += batch.target_tokens
            if number == 0:
                logits = _probe(model, batch)
    return ModelOutputs(total / max(1, target_tokens), target_tokens, logits)


def _probe(model: PreTrainedModel, batch: Batch) -> Tensor:
    tokens, positions = batch.input_ids[:1, :PROBE_TOKENS], batch.position_ids[:1, :PROBE_TOKENS]
    logits: Tensor = model(**body_inputs(model.config, tokens, positions)).logits
    return logits[0].float().cpu()
