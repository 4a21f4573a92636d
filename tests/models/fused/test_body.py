"""The fused body computes what the stock one does, with the same gradients, for every model it knows."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaModel

from nybble.adapters.config import LoraConfig
from nybble.adapters.inject import adapter_parameters, inject
from nybble.models.attention import body_inputs
from nybble.models.fused.body import FusedBody
from nybble.models.fused.reason import CannotFuseError
from nybble.models.fused.stacked import joined
from nybble.models.skeleton import replace_modules
from nybble.optim.flat import FlatAdamW
from nybble.plan import Activations, MemoryPlan
from nybble.quant.format import NF4Spec
from nybble.quant.linear import DenseLinear, NF4Linear
from tests import tiny
from tests.adapters.support import randomize
from tests.models.test_packing import packed, relative_gap, rounding, samples
from tests.tiny import DENSE_KINDS, VOCAB_SIZE, random_model

KINDS = [kind for kind in DENSE_KINDS if kind != "gpt2"]
SAMPLES_A_ROW = 4  # three, and one of padding at most


def model_of(
    kind: str, *, nf4: bool = True, adapter: bool = True, num_layers: int = 2, **settings: object
) -> PreTrainedModel:
    """In fp64 with a frozen NF4 base and a random adapter whose scaling is 1.5."""
    model = random_model(kind, **layers_of(kind, num_layers)).double()
    model.set_attn_implementation("eager")
    replace_modules(model, torch.float64)
    model.requires_grad_(False)
    if nf4:
        quantize(model)
    if adapter:
        inject(model, LoraConfig(**({"r": 4, "lora_alpha": 6} | settings)))
        model.double()
        randomize(adapter_parameters(model))
    return model


def layers_of(kind: str, num_layers: int) -> dict[str, object]:
    """Settings of a tiny model with more layers than its two."""
    types = tiny.KINDS[kind][1].get("layer_types")
    repeated = {} if types is None else {"layer_types": types * (num_layers // 2)}
    return {} if num_layers == 2 else {"num_hidden_layers": num_layers} | repeated


def quantize(model: nn.Module, compute: torch.dtype = torch.float64) -> None:
    linears = [(path, m) for path, m in model.named_modules() if isinstance(m, DenseLinear) and "lm_head" not in path]
    for path, linear in linears:
        model.set_submodule(path, NF4Linear.from_linear(linear, NF4Spec(), compute))


def stock_body(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    hidden = model.base_model(**body_inputs(model.config, input_ids, position_ids)).last_hidden_state
    return hidden.flatten(0, 1)


def output_and_gradients(model: PreTrainedModel, hidden: Tensor) -> list[Tensor]:
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3), dtype=hidden.dtype)
    return [hidden, *torch.autograd.grad((hidden * weights).sum(), list(adapter_parameters(model).values()))]


def fused_body(model: PreTrainedModel, activations: Activations = "keep", **settings: Any) -> FusedBody:
    """With all layers held alike."""
    plan = MemoryPlan.uniform(len(model.base_model.layers), activations)
    return FusedBody(model, samples_a_row=SAMPLES_A_ROW, plan=dataclasses.replace(plan, **settings))


@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows(kind: str, nf4: bool) -> None:
    model = model_of(kind, nf4=nf4)
    input_ids, _, position_ids = packed(samples())
    stock = output_and_gradients(model, stock_body(model, input_ids, position_ids))
    body = FusedBody(model, samples_a_row=SAMPLES_A_ROW)
    fused = output_and_gradients(model, body(input_ids, position_ids))
    for ours, reference in zip(fused, stock, strict=True):
        assert relative_gap(ours, reference) < rounding(kind, "eager")
    assert len(fused) > 10


@pytest.mark.parametrize("kind", KINDS)
def test_whole_rows(kind: str) -> None:
    model = model_of(kind)
    input_ids = torch.randint(3, VOCAB_SIZE, (2, 24))
    position_ids = torch.arange(24).expand(2, 24)
    stock = output_and_gradients(model, stock_body(model, input_ids, position_ids))
    fused = output_and_gradients(model, FusedBody(model, samples_a_row=1)(input_ids, position_ids))
    for ours, reference in zip(fused, stock, strict=True):
        assert relative_gap(ours, reference) < rounding(kind, "eager")


def test_two_passes_before_a_backward_pass() -> None:
    model = model_of("llama")
    body = fused_body(model, "recompute")
    input_ids, _, position_ids = packed(samples())
    alone = [
        output_and_gradients(model, FusedBody(model, samples_a_row=4)(ids, position_ids))[1:]
        for ids in (input_ids, input_ids.flip(1))
    ]
    model.zero_grad()
    weights = torch.randn(input_ids.numel(), 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    total = sum((body(ids, position_ids) * weights).sum() for ids in (input_ids, input_ids.flip(1)))
    total.backward()
    for parameter, one, other in zip(adapter_parameters(model).values(), *alone, strict=True):
        assert relative_gap(parameter.grad, one + other) < 1e-12


def test_gradients_that_are_there_are_added_to() -> None:
    """FlatAdamW keeps stacked adapters side by side, so that products add to all their gradients at once."""
    model = model_of("qwen2", r=16)
    for parameter in adapter_parameters(model).values():
        parameter.data = parameter.data.float()
    body = FusedBody(model, samples_a_row=4)
    parameters = list(adapter_parameters(model).values())
    input_ids, _, position_ids = packed(samples())
    body(input_ids, position_ids).square().sum().backward()
    once = [parameter.grad for parameter in parameters]
    optimizer = FlatAdamW(parameters, lr=1e-3)
    optimizer.zero_grad()
    q, k, v = (model.base_model.layers[0].self_attn.get_submodule(n).chosen for n in ("q_proj", "k_proj", "v_proj"))
    assert len(joined([q.lora_A.grad, k.lora_A.grad, v.lora_A.grad])) == 3 * 16
    for _ in range(2):
        body(input_ids, position_ids).square().sum().backward()
    for parameter, gradient in zip(parameters, once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())
    optimizer.step()
    fresh = FusedBody(model, samples_a_row=4)
    assert torch.equal(fresh(input_ids, position_ids), body(input_ids, position_ids))
    optimizer.step()  # nothing was moved


@pytest.mark.parametrize("activations", ["keep", "recompute"])
@pytest.mark.parametrize(
    "targets",
    [
        ["o_proj", "gate_proj", "up_proj"],
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
        r".*layers\.1\..*down_proj",
        r".*layers\.1\..*o_proj",
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_partial_targets(kind: str, targets: list[str] | str, activations: str) -> None:
    """Only some projections have an adapter, and perhaps not in each block."""
    model = model_of(kind, target_modules=targets)
    input_ids, _, position_ids = packed(samples())
    stock = output_and_gradients(model, stock_body(model, input_ids, position_ids))
    fused = fused_body(model, activations)(input_ids, position_ids)
    weights = torch.randn(fused.shape, generator=torch.Generator().manual_seed(3), dtype=fused.dtype)
    (fused * weights).sum().backward()
    found = [fused, *(parameter.grad for parameter in adapter_parameters(model).values())]
    for ours, reference in zip(found, stock, strict=True):
        assert relative_gap(ours, reference) < rounding(kind, "eager")


def test_llama_has_no_window_whatever_its_configuration_says() -> None:
    model = model_of("llama")
    model.config.sliding_window = 4
    input_ids, position_ids = torch.arange(3, 33)[None], torch.arange(30)[None]
    fused = FusedBody(model, samples_a_row=1)(input_ids, position_ids)
    assert relative_gap(fused, stock_body(model, input_ids, position_ids)) < rounding("llama", "eager")


def test_as_many_layers_as_the_configuration_says() -> None:
    model = model_of("llama")
    model.config.num_hidden_layers = 1
    input_ids, position_ids = torch.arange(3, 33)[None], torch.arange(30)[None]
    fused = FusedBody(model, samples_a_row=1)(input_ids, position_ids)
    assert relative_gap(fused, stock_body(model, input_ids, position_ids)) < rounding("llama", "eager")


def test_a_body_of_another_class_is_not_known() -> None:
    class Scaled(LlamaModel):
        pass

    model = model_of("llama")
    model.model.__class__ = Scaled
    with pytest.raises(CannotFuseError, match="Scaled is not known"):
        FusedBody(model, samples_a_row=1)


def test_built_twice_weights_are_shared_still() -> None:
    model = model_of("qwen2", nf4=False)
    first, second = FusedBody(model, samples_a_row=1), FusedBody(model, samples_a_row=1)
    assert (
        second.blocks[0].attention.qkv.matrix.resident.data_ptr()
        == first.blocks[0].attention.qkv.matrix.resident.data_ptr()
    )


def test_fp8_needs_bf16() -> None:
    with pytest.raises(CannotFuseError, match="give bf16"):
        FusedBody(model_of("llama"), samples_a_row=1, precision="fp8")


def test_weights_stay_where_stock_modules_have_them() -> None:
    model = model_of("qwen2", nf4=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    FusedBody(model, samples_a_row=1)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    q, k = (model.base_model.layers[0].self_attn.get_submodule(name).weight for name in ("q_proj", "k_proj"))
    assert k.data_ptr() == q.data_ptr() + q.nbytes  # neighbours in one matrix, not copies


def test_copies_of_adapters_lie_together() -> None:
    body = FusedBody(model_of("llama"), samples_a_row=1)
    places = [place for place, _ in body._copies]
    assert len({place.untyped_storage().data_ptr() for place in places}) == 1
    assert len({place.data_ptr() for place in places}) == len(places)
    assert all(torch.equal(place, master.to(place.dtype)) for place, master in body._copies)


def test_trained_adapters_are_read_at_each_call() -> None:
    model = model_of("llama")
    body = FusedBody(model, samples_a_row=1)
    input_ids, position_ids = torch.arange(3, 19)[None], torch.arange(16)[None]
    before = body(input_ids, position_ids)
    randomize(adapter_parameters(model), seed=9)
    assert not torch.equal(before, body(input_ids, position_ids))
    stock = stock_body(model, input_ids, position_ids)
    assert relative_gap(body(input_ids, position_ids), stock) < rounding("llama", "eager")


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("gpt2", {}, "GPT2Model"),
        ("llama", {"use_dora": True}, "DoRA"),
        ("llama", {"lora_dropout": 0.1}, "dropout"),
        ("llama", {"target_modules": ["q_proj"]}, "and not all"),
        ("llama", {"rank_pattern": {"q_proj": 2}}, "different ranks"),
        ("mixtral", {"target_modules": "attention"}, "MixtralModel"),
    ],
)
def test_what_cannot_be_fused_says_why(kind: str, settings: dict[str, object], reason: str) -> None:
    model = model_of(kind, nf4=False, **settings)
    with pytest.raises(CannotFuseError, match=reason):
        FusedBody(model, samples_a_row=1)


def model_in_bf16(kind: str, *, nf4: bool = True, num_layers: int = 2, **sizes: int) -> PreTrainedModel:
    """Adapted, and of sizes that fp8 takes."""
    model = random_model(kind, intermediate_size=128, **layers_of(kind, num_layers), **sizes).bfloat16()
    replace_modules(model, torch.bfloat16)
    model.requires_grad_(False)
    if nf4:
        quantize(model, torch.bfloat16)
    inject(model, LoraConfig(r=4, lora_alpha=6))
    randomize(adapter_parameters(model))
    return model


@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "dense"])
def test_products_in_fp8_are_near_those_in_bf16(nf4: bool) -> None:
    """e4m3 keeps 3 bits of the mantissa: every factor errs by up to 6 %, at random, so directions are kept."""
    model = model_in_bf16("llama", nf4=nf4)
    input_ids, position_ids = torch.arange(3, 43)[None], torch.arange(40)[None]
    found = [
        output_and_gradients(model, FusedBody(model, samples_a_row=1, precision=p)(input_ids, position_ids))
        for p in ("bf16", "fp8")
    ]
    half, eighth = (torch.cat([part.float().flatten() for part in parts]) for parts in found)
    assert not torch.equal(half, eighth)
    assert torch.cosine_similarity(half, eighth, dim=0) > 0.97


def test_fp8_needs_rows_of_whole_blocks() -> None:
    model = random_model("llama").bfloat16()  # 96 columns of down_proj are a block and a half
    replace_modules(model, torch.bfloat16)
    model.requires_grad_(False)
    quantize(model, torch.bfloat16)
    with pytest.raises(CannotFuseError, match="whole NF4 blocks, not 64 x 96"):
        FusedBody(model, samples_a_row=1, precision="fp8")
