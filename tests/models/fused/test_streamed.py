"""A step over streamed layers ends at the first of them, however far its backward pass goes."""

from __future__ import annotations

import pytest
import torch

from nybble.adapters.config import LoraConfig
from nybble.adapters.inject import inject
from nybble.models.fused.body import FusedBody
from nybble.models.fused.loss import FusedCausalLMLoss
from nybble.models.skeleton import replace_modules
from nybble.optim.adamw import build_optimizer
from nybble.optim.config import OptimConfig
from nybble.plan import MemoryPlan
from nybble.train.step import EagerStep
from tests.tiny import random_model
from tests.train.toy import window


@pytest.mark.parametrize("adapted", [r".*layers\.\d\..*proj", r".*layers\.[34]\..*proj"])
def test_a_step_ends_at_the_first_layers(adapted: str) -> None:
    model = random_model("llama", num_hidden_layers=5)
    replace_modules(model, torch.float32)
    inject(model, LoraConfig(r=4, target_modules=adapted))
    body = FusedBody(model, samples_a_row=1, plan=MemoryPlan.uniform(5, "recompute", "streamed"))
    assert body.stream is not None
    loss = FusedCausalLMLoss(model, body)
    step = EagerStep(loss, build_optimizer(loss, OptimConfig()), max_grad_norm=1.0)
    step.launch(window([(2, 12), (1, 7)], 0), seed=0)
    assert step.read().grad_norm > 0
    assert body.stream.on_device == [0, 1]
