"""What the planner says a micro-batch takes, against the tensors of the real body and loss as they come and go.

Attention stands in for a GPU's: it keeps the same tensors. Workspaces within ops are not seen.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from nybble.adapters.config import LoraConfig
from nybble.adapters.inject import inject
from nybble.memory import saved
from nybble.memory.host_matrix import HostLinear
from nybble.memory.saved import SavedOnHost
from nybble.models.fp32 import compute_in_fp32
from nybble.models.fused import block as blocks
from nybble.models.fused.body import FusedBody
from nybble.models.fused.loss import FusedCausalLMLoss
from nybble.models.fused.policy import Units
from nybble.models.loss import CausalLMLoss
from nybble.models.skeleton import replace_modules
from nybble.ops import online_cross_entropy
from nybble.optim.flat import FlatAdamW
from nybble.plan import LayerPolicy, MemoryPlan
from nybble.planner import units
from nybble.planner.cards import card
from nybble.planner.holdings import weights_on_device
from nybble.planner.run_shape import RunShape
from nybble.planner.shapes import ModelShape
from nybble.planner.sizes import Sizes
from nybble.planner.step import MicroBatch
from nybble.planner.stock import StockStep
from nybble.planner.tape import Passage, Segment, peak, replay
from nybble.planner.units import walk_of
from nybble.quant.format import NF4Spec
from nybble.quant.linear import DenseLinear, NF4Linear
from nybble.train.activation_checkpointing import enable_activation_checkpointing
from tests.planner.live import Flash, LiveBytes

BATCH, SEQ_LEN = 2, 64
LAYERS = 4
# Scalars of the loss and of random states: a handful of the allocator's smallest blocks.
SCALARS = 16 * 512

WIDE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": LAYERS, "num_attention_heads": 8}
LLAMA = {"model_type": "llama", **WIDE, "num_key_value_heads": 2, "vocab_size": 512}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "large vocabulary": {**LLAMA, "vocab_size": 16384},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 16},
    "gemma2": {**LLAMA, "model_type": "gemma2", "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"},
    "phi3": {**LLAMA, "model_type": "phi3", "pad_token_id": 0},
}
KEEP = MemoryPlan.uniform(LAYERS)
RECOMPUTE = MemoryPlan.uniform(LAYERS, "recompute")
PLANS = {
    "keep": KEEP,
    "keep_matmuls": MemoryPlan.uniform(LAYERS, "keep_matmuls"),
    "recompute": RECOMPUTE,
    "keep_on_host": MemoryPlan.uniform(LAYERS, "keep_on_host"),
    "some kept on the host": MemoryPlan(
        (LayerPolicy("keep_on_host"), LayerPolicy("recompute"), LayerPolicy("keep_on_host"), LayerPolicy())
    ),
    "recompute, span 2": replace(RECOMPUTE, span=2),
    "recompute, by rows": replace(RECOMPUTE, mlp_rows=32),
    "recompute, span 2, by rows": replace(RECOMPUTE, span=2, mlp_rows=32),
    "mixed": MemoryPlan(
        (LayerPolicy("recompute"), LayerPolicy("recompute"), LayerPolicy("keep_matmuls"), LayerPolicy())
    ),
}


def made_model(kind: str, method: str) -> PreTrainedModel:
    settings = dict(CONFIGS[kind])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
    replace_modules(model, torch.bfloat16)
    linears = [(path, m) for path, m in model.named_modules() if isinstance(m, DenseLinear) and "lm_head" not in path]
    for path, linear in linears if method == "qlora" else []:
        model.set_submodule(path, NF4Linear.from_linear(linear, NF4Spec(), torch.bfloat16))
    inject(model, LoraConfig(r=8))
    return model


def measured(model: PreTrainedModel, plan: MemoryPlan, *, evaluates: bool = False) -> LiveBytes:
    body = FusedBody(model, samples_a_row=1, plan=plan)
    on_host = [layer.activations == "keep_on_host" for layer in plan.layers]
    if any(on_host):  # as beside a GPU
        store = SavedOnHost(torch.device("cpu"))
        parts = [replace(part, store=store) if away else part for part, away in zip(body.units, on_host, strict=True)]
        body.units = Units(parts, [store])
    loss = FusedCausalLMLoss(model, body)
    FlatAdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)  # gives gradients
    ids = torch.randint(3, 500, (BATCH, SEQ_LEN))
    positions = torch.arange(SEQ_LEN).expand(BATCH, SEQ_LEN).contiguous()
    gc.collect()
    live = LiveBytes()
    with live, torch.set_grad_enabled(not evaluates):
        value = loss(ids, ids, positions)
        if not evaluates:
            value.backward()
    return live


def predicted(kind: str, method: Any, plan: MemoryPlan, *, evaluates: bool = False, **settings: Any) -> list[Passage]:
    run = RunShape(method=method, rank=8, batch=BATCH, seq_len=SEQ_LEN, **settings)
    sizes = Sizes(ModelShape.from_config(CONFIGS[kind]), run)
    micro_batch = MicroBatch(sizes, card("h100"), plan, BATCH, SEQ_LEN)
    passages = micro_batch.evaluation() if evaluates else micro_batch.training()
    return [(number, without_workspaces(segment)) for number, segment in passages]


def without_workspaces(segment: Segment) -> Segment:
    unseen = {name for name, _, category in segment.events if category == "workspaces"}
    return Segment(tuple(event for event in segment.events if event[0] not in unseen), segment.sizes)


@pytest.fixture(autouse=True)
def little_stays_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small these models are."""
    for module in (saved, units):
        monkeypatch.setattr(module, "LEAST_ON_HOST_BYTES", 4096)
    walk_of.cache_clear()


@pytest.fixture(autouse=True)
def attention_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    flash: Callable[..., Tensor] = Flash.apply
    monkeypatch.setattr(blocks, "attend", lambda q, k, v, *_: flash(q, k, v).flatten(1))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", ["llama", "large vocabulary"])
def test_every_policy(kind: str, plan: str) -> None:
    live, passages = measured(made_model(kind, "lora"), PLANS[plan]), predicted(kind, "lora", PLANS[plan])
    assert peak(passages) == pytest.approx(live.most, abs=SCALARS)
    assert sum(segment.change for _, segment in passages) == 0


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "phi3"])
@pytest.mark.parametrize("plan", ["keep", "keep_on_host", "recompute", "recompute, by rows"])
def test_every_family_in_nf4(kind: str, plan: str) -> None:
    live, passages = measured(made_model(kind, "qlora"), PLANS[plan]), predicted(kind, "qlora", PLANS[plan])
    assert peak(passages) == pytest.approx(live.most, abs=SCALARS)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "large vocabulary"])
@pytest.mark.parametrize("plan", ["keep", "recompute, by rows"])
def test_evaluation(kind: str, plan: str) -> None:
    live = measured(made_model(kind, "lora"), PLANS[plan], evaluates=True)
    assert peak(predicted(kind, "lora", PLANS[plan], evaluates=True)) == pytest.approx(live.most, abs=SCALARS)


@pytest.mark.parametrize("evaluates", [False, True])
def test_a_head_in_host_memory(evaluates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # A GPU sums products of 16-bit values in fp32 without casting them first.
    monkeypatch.setattr(online_cross_entropy, "add_product_", lambda *_: None)
    kind, plan = "large vocabulary", replace(RECOMPUTE, head="host")
    model = made_model(kind, "lora")
    model.lm_head = HostLinear.taking(model.lm_head, torch.device("cpu"))
    live = measured(model, plan, evaluates=evaluates)
    assert peak(predicted(kind, "lora", plan, evaluates=evaluates)) == pytest.approx(live.most, abs=SCALARS)


@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("kind", ["llama", "large vocabulary"])
def test_a_head_in_nf4(kind: str, evaluates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online_cross_entropy, "add_product_", lambda *_: None)
    model = made_model(kind, "lora")
    model.lm_head = NF4Linear.from_linear(model.lm_head, NF4Spec.of(64, double_quant=True), torch.bfloat16)
    live = measured(model, RECOMPUTE, evaluates=evaluates)
    passages = predicted(kind, "lora", RECOMPUTE, evaluates=evaluates, nf4_head=True)
    assert peak(passages) == pytest.approx(live.most, abs=SCALARS)
    sizes = Sizes(ModelShape.from_config(CONFIGS[kind]), RunShape(method="lora", nf4_head=True))
    assert sizes.head == tuple(tensor.nbytes for tensor in model.lm_head.stored())
    assert ("weights", sizes.head[0]) in list(weights_on_device(sizes, RECOMPUTE))


@pytest.mark.parametrize("plan", [KEEP, RECOMPUTE], ids=["keep", "recompute"])
def test_stock_modules_that_train_all_weights(plan: MemoryPlan) -> None:
    """An estimate: no less than the tensors take, casts of fp32 weights included, and not half as much again."""
    settings = dict(CONFIGS["large vocabulary"])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    replace_modules(model, torch.bfloat16)
    compute_in_fp32(model, torch.bfloat16)
    if plan == RECOMPUTE:
        enable_activation_checkpointing(model)
    loss = CausalLMLoss(model.train())
    FlatAdamW(list(model.parameters()), lr=1e-3)
    ids, positions = torch.randint(3, 500, (BATCH, SEQ_LEN)), torch.arange(SEQ_LEN).repeat(BATCH, 1)
    live = LiveBytes()
    with live:
        loss(ids, ids, positions).backward()
    run = RunShape(method="full", batch=BATCH, seq_len=SEQ_LEN, storage_bytes=4)
    step = StockStep(Sizes(ModelShape.from_config(CONFIGS["large vocabulary"]), run), plan, BATCH * SEQ_LEN)
    assert live.most <= sum(step.training().values()) <= 1.5 * live.most


OFFLOAD = MemoryPlan.uniform(LAYERS, "offload")
ALL_PLANS = PLANS | {
    "offload": OFFLOAD,
    "offload, by rows": replace(OFFLOAD, mlp_rows=32),
    "offload, no middle, by rows": replace(OFFLOAD, mlp_rows=32, keep_middle=False),
    "offload, span 2": replace(OFFLOAD, span=2),
}


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("plan", ALL_PLANS)
def test_what_is_taken_is_given_back(kind: str, plan: str) -> None:
    """By name: nothing is taken twice at once, nothing stays, and sums by segment agree."""
    passages = predicted(kind, "qlora", ALL_PLANS[plan])
    held: dict[Any, int] = {}
    most = 0
    for key, nbytes, _ in replay(passages):
        if nbytes:
            assert key not in held
            held[key] = nbytes
        else:
            del held[key]
        most = max(most, sum(held.values()))
    assert held == {}
    assert most == peak(passages)
