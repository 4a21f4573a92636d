"""The fused body on a card: its kernels, attention, recomputation and offload, in bf16, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from nybble.adapters.config import LoraConfig
from nybble.adapters.inject import adapter_parameters, inject
from nybble.models.fused.body import FusedBody
from nybble.models.fused.loss import FusedCausalLMLoss
from nybble.models.loss import CausalLMLoss
from nybble.models.skeleton import replace_modules
from nybble.plan import Activations, LayerPolicy, MemoryPlan
from nybble.quant.format import NF4Spec
from nybble.quant.linear import DenseLinear, NF4Linear
from nybble.train.determinism import deterministic_kernels
from tests.models.fused.test_body import KINDS, fused_body
from tests.tiny import VOCAB_SIZE, random_model

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
SIZES = {"hidden_size": 192, "intermediate_size": 320, "head_dim": 64}


def plan_of(activations: str, weights: str = "resident", **settings: Any) -> MemoryPlan:
    """For two layers, whose kinds are given, one for both or one each."""
    kinds = 2 * activations.split()
    layers = tuple(LayerPolicy(kind, weights) for kind in kinds[:2])
    return MemoryPlan(layers, **settings)


def model_on(kind: str, dtype: torch.dtype, *, nf4: bool = True) -> PreTrainedModel:
    """The same numbers in every dtype, but for rounding: weights and adapters are drawn, and rounded to bf16 first."""
    sizes = dict(SIZES)
    if kind in ("llama", "smollm", "qwen2", "phi3"):
        del sizes["head_dim"]  # 192 / 4 = 48
    model = random_model(kind, **sizes).bfloat16().to(dtype)
    model.set_attn_implementation("eager")
    replace_modules(model, dtype)
    model.requires_grad_(False)
    model.to(CUDA)
    for path, linear in [(p, m) for p, m in model.named_modules() if isinstance(m, DenseLinear) and "lm_head" not in p]:
        if nf4:
            model.set_submodule(path, NF4Linear.from_linear(linear.float(), NF4Spec(), dtype))
    inject(model, LoraConfig(r=8, lora_alpha=12, dtype="fp32"))
    for number, (_, parameter) in enumerate(sorted(adapter_parameters(model).items())):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1
        parameter.data = (parameter.detach() + noise.to(CUDA)).bfloat16().to(torch.promote_types(dtype, torch.float32))
    return model


def batch(*, packed: bool, rows: int = 3, seq_len: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(3, VOCAB_SIZE, (rows, seq_len), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(seq_len).expand(rows, seq_len)
    if packed:
        lengths = [70, 1, 100, 29]
        positions = torch.cat([torch.arange(length) for length in lengths]).expand(rows, seq_len)
    labels = ids.masked_fill(positions == 0, -100)
    return ids.to(CUDA), labels.to(CUDA), positions.contiguous().to(CUDA)


def loss_and_gradients(module: CausalLMLoss, inputs: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    module.zero_grad()
    loss = module(*inputs) / inputs[0].numel()
    loss.backward()
    gradients = [parameter.grad for parameter in adapter_parameters(module.model).values()]
    return [loss.detach().double(), *(gradient.double() for gradient in gradients)]


def error(found: list[Tensor], reference: list[Tensor]) -> float:
    """Over all tensors, relative."""
    gaps = [((a - b).norm() / b.norm().clamp(min=1e-30)).square() for a, b in zip(found, reference, strict=True)]
    return torch.stack(gaps).mean().sqrt().item()


@pytest.mark.filterwarnings("ignore")  # of compilers, where attention is FlexAttention's: torch 2.11 looks at .grad
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_errs_no_more_than_twice_the_generic_path(kind: str, packed: bool) -> None:
    inputs = batch(packed=packed)
    exact = loss_and_gradients(CausalLMLoss(model_on(kind, torch.float64)), inputs)
    model = model_on(kind, torch.bfloat16)
    generic = loss_and_gradients(CausalLMLoss(model), inputs)
    fused = FusedCausalLMLoss(model, FusedBody(model, samples_a_row=4 if packed else 1))
    assert error(loss_and_gradients(fused, inputs), exact) <= 2 * error(generic, exact)


PLANS = {
    "keep_matmuls": plan_of("keep_matmuls"),
    "keep_on_host": plan_of("keep_on_host"),
    "some kept on the host, streamed": plan_of("keep_on_host offload", "streamed"),
    "recompute": plan_of("recompute"),
    "recompute both": plan_of("recompute", span=2),
    "offload": plan_of("offload"),
    "offload without middle": plan_of("offload", keep_middle=False),
    "mixed": plan_of("keep_matmuls offload"),
    "streamed": plan_of("recompute", "streamed", stream_slots=1),
    "mixed, streamed": plan_of("offload keep", "streamed"),
}


@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_plans_give_the_same_bits(plan: MemoryPlan, kind: str, nf4: bool) -> None:
    inputs = batch(packed=True)
    model = model_on(kind, torch.bfloat16, nf4=nf4)
    with deterministic_kernels(enabled=True):
        expected = loss_and_gradients(FusedCausalLMLoss(model, fused_body(model)), inputs)
        module = FusedCausalLMLoss(model, FusedBody(model, samples_a_row=4, plan=plan))
        for _ in range(2):  # the second pass uses the host's memory again
            found = loss_and_gradients(module, inputs)
            assert all(map(torch.equal, found, expected))


def test_plans_give_the_same_loss_without_deterministic_kernels() -> None:
    """Only the backward pass of attention is left to chance."""
    inputs = batch(packed=False)
    model = model_on("llama", torch.bfloat16)
    plans = [plan_of("keep"), *PLANS.values()]
    losses = [FusedCausalLMLoss(model, FusedBody(model, samples_a_row=1, plan=plan))(*inputs) for plan in plans]
    assert len({loss.item() for loss in losses}) == 1


@pytest.mark.parametrize("activations", ["recompute", "offload"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_an_mlp_by_rows_errs_no_more(kind: str, activations: Activations) -> None:
    inputs = batch(packed=True)
    exact = loss_and_gradients(CausalLMLoss(model_on(kind, torch.float64)), inputs)
    model = model_on(kind, torch.bfloat16)
    generic = loss_and_gradients(CausalLMLoss(model), inputs)
    fused = FusedCausalLMLoss(model, fused_body(model, activations, mlp_rows=128))
    for _ in range(2):
        assert error(loss_and_gradients(fused, inputs), exact) <= 2 * error(generic, exact)


@pytest.mark.filterwarnings("ignore")
def test_flex_attention_saves_on_the_host() -> None:
    inputs = batch(packed=True)
    exact = loss_and_gradients(CausalLMLoss(model_on("gemma2", torch.float64)), inputs)
    model = model_on("gemma2", torch.bfloat16)
    generic = loss_and_gradients(CausalLMLoss(model), inputs)
    fused = FusedCausalLMLoss(model, fused_body(model, "keep_on_host"))
    for _ in range(2):
        assert error(loss_and_gradients(fused, inputs), exact) <= 2 * error(generic, exact)


def test_leaner_for_one_step() -> None:
    inputs = batch(packed=True)
    model = model_on("llama", torch.bfloat16)
    module = FusedCausalLMLoss(model, fused_body(model))
    with deterministic_kernels(enabled=True):
        expected = loss_and_gradients(module, inputs)
        with module.body.leaner():
            assert all(map(torch.equal, loss_and_gradients(module, inputs), expected))


@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "dense"])
def test_fp8_errs_as_its_mantissa_says(nf4: bool) -> None:
    """e4m3 keeps 3 bits of the mantissa and bf16 7, so roundings are 16 times coarser."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 on this card")
    inputs = batch(packed=False)
    exact = loss_and_gradients(CausalLMLoss(model_on("llama", torch.float64, nf4=nf4)), inputs)
    model = model_on("llama", torch.bfloat16, nf4=nf4)
    generic = loss_and_gradients(CausalLMLoss(model), inputs)
    found = loss_and_gradients(FusedCausalLMLoss(model, FusedBody(model, samples_a_row=1, precision="fp8")), inputs)
    assert error(generic, exact) < error(found, exact) <= 2 * 16 * error(generic, exact)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_a_step_waits_for_the_device_nowhere() -> None:
    inputs = batch(packed=True)
    model = model_on("gemma3_text", torch.bfloat16)
    module = FusedCausalLMLoss(model, fused_body(model, "offload"))
    module(*inputs).backward()  # kernels are compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(*inputs).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
