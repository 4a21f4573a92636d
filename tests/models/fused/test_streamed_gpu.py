"""Training over streamed layers on a card, from loading on: the losses of resident ones, as CUDA graphs too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nybble.adapters.config import LoraConfig
from nybble.adapters.inject import adapter_parameters, inject
from nybble.models.config import ModelConfig
from nybble.models.ends import place_ends
from nybble.models.fused.body import FusedBody
from nybble.models.fused.loss import FusedCausalLMLoss
from nybble.models.load import load_model
from nybble.optim.adamw import build_optimizer
from nybble.optim.config import OptimConfig
from nybble.plan import LayerPolicy, MemoryPlan
from nybble.train.determinism import deterministic_kernels
from nybble.train.graph import GraphStep, Recorder
from nybble.train.step import EagerStep
from tests.train.toy import window

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
NUM_LAYERS = 5


def loss_over(folder: Path, plan: MemoryPlan, storage: str, adapted: str) -> FusedCausalLMLoss:
    config = ModelConfig(name=str(folder), compute="bf16")
    model = load_model(config, device=CUDA, storage=storage, plan=plan).model
    inject(model, LoraConfig(r=8, target_modules=adapted), device=CUDA)
    assert all(parameter.device.type == "cuda" for parameter in adapter_parameters(model).values())
    place_ends(model, plan, CUDA)
    return FusedCausalLMLoss(model, FusedBody(model, samples_a_row=1, plan=plan))


def losses(loss: FusedCausalLMLoss, *, graph: bool) -> list[float]:
    """Of steps, each followed by an evaluation, which brings other layers to the device."""
    eager = EagerStep(loss, build_optimizer(loss, OptimConfig(learning_rate=1e-2)), max_grad_norm=1.0)
    executor = GraphStep(eager, Recorder(CUDA)) if graph else eager
    found = []
    for seed in range(6):
        taken = window([(2, 96), (2, 96)], seed, pinned=True)
        assert executor.launch(taken, seed) is None
        found.append(executor.read().loss)
        executor.finish()
        with torch.no_grad():
            found.append(float(loss(*(part.cuda() for part in taken.inputs[0]))))
    if isinstance(executor, GraphStep):
        assert executor.has_graph(taken)
    return found


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("adapted", ["all-linear", r".*layers\.[34]\..*proj"], ids=["all", "last"])
@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_streamed_layers_train_as_resident_ones(
    tiny: Callable[..., Path], storage: str, adapted: str, graph: bool
) -> None:
    folder = tiny("llama", dtype="bfloat16", num_hidden_layers=NUM_LAYERS, hidden_size=128, intermediate_size=192)
    recompute, streamed = LayerPolicy("recompute"), LayerPolicy("recompute", "streamed")
    mixed = MemoryPlan((streamed, streamed, recompute, streamed, streamed))
    with deterministic_kernels(enabled=True):
        expected = losses(loss_over(folder, MemoryPlan((recompute,) * NUM_LAYERS), storage, adapted), graph=False)
        found = losses(loss_over(folder, mixed, storage, adapted), graph=graph)
    assert found == expected
    assert expected[-1] < expected[1]
