"""The fused loss equals the generic one, and its gradients too, for every way a model makes logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nybble.adapters.inject import adapter_parameters
from nybble.labels import IGNORED
from nybble.models.ends import place_ends
from nybble.models.fused.body import FusedBody
from nybble.models.fused.loss import FusedCausalLMLoss
from nybble.models.loss import CausalLMLoss
from nybble.plan import MemoryPlan
from nybble.quant.format import NF4Spec
from nybble.quant.linear import DenseLinear, NF4Linear
from tests.models.fused.test_body import KINDS, SAMPLES_A_ROW, model_of
from tests.models.test_packing import packed, relative_gap, rounding, samples


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.models.fused.loss.CHUNK_BYTES", 0)  # the smallest chunks: 128 rows
    model = model_of(kind)
    batch = tuple(torch.cat([part] * 3) for part in packed(samples()))  # 192 rows: a chunk and a half
    batch[1][0, 3:9] = IGNORED
    fused = FusedCausalLMLoss(model, FusedBody(model, samples_a_row=SAMPLES_A_ROW))
    assert fused.capturable
    results = []
    for module in (CausalLMLoss(model), fused):
        loss = module(*batch)
        results.append([loss.detach(), *torch.autograd.grad(loss, list(adapter_parameters(model).values()))])
    for reference, ours in zip(*results, strict=True):
        assert relative_gap(ours, reference) < rounding(kind, "eager")
    with torch.no_grad():
        assert relative_gap(fused(*batch), results[0][0]) < rounding(kind, "eager")


def test_a_head_in_nf4() -> None:
    """Near the 16-bit head's loss, and what its own weights give."""
    model = model_of("llama")
    batch = packed(samples())
    trained = list(adapter_parameters(model).values())

    def results(module: CausalLMLoss) -> list[torch.Tensor]:
        loss = module(*batch)
        return [loss.detach(), *torch.autograd.grad(loss, trained)]

    whole, *_ = results(CausalLMLoss(model))
    head = NF4Linear.from_linear(model.lm_head, NF4Spec(), torch.float64)
    dequantized = DenseLinear.from_weight(head.dequantize(torch.float64), None, torch.float64)
    model.set_output_embeddings(dequantized)
    expected = results(CausalLMLoss(model))
    model.set_output_embeddings(head)
    fused = FusedCausalLMLoss(model, FusedBody(model, samples_a_row=SAMPLES_A_ROW))
    assert fused.capturable
    found = results(fused)
    assert all(
        relative_gap(ours, reference) < rounding("llama", "eager")
        for ours, reference in zip(found, expected, strict=True)
    )
    assert 0 < relative_gap(found[0], whole) < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_ends_in_host_memory(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.models.streamed_loss.CHUNK_BYTES", 0)  # 128 tokens and 128 words at a time
    model = model_of(kind)
    batch = tuple(torch.cat([part] * 3) for part in packed(samples()))
    batch[1][0, 3:9] = IGNORED
    plan = replace(MemoryPlan.uniform(2), embedding="host", head="host")
    results = []
    for module in (CausalLMLoss(model), None):
        if module is None:
            place_ends(model, plan, torch.device("cpu"))
            module = FusedCausalLMLoss(model, FusedBody(model, samples_a_row=SAMPLES_A_ROW, plan=plan))
            assert module.capturable
        loss = module(*batch)
        results.append([loss.detach(), *torch.autograd.grad(loss, list(adapter_parameters(model).values()))])
        with torch.no_grad():
            results[-1] += [module(*batch), module.token_losses(*batch)]
    for reference, ours in zip(*results, strict=True):
        assert relative_gap(ours, reference) < rounding(kind, "eager")


@pytest.mark.parametrize("kind", KINDS)
def test_layers_may_be_elsewhere_when_it_is_built(kind: str) -> None:
    model = model_of(kind)
    expected = CausalLMLoss(model).logit_rule
    body = FusedBody(model, samples_a_row=SAMPLES_A_ROW)
    hooks = [layer.register_forward_pre_hook(_not_here) for layer in model.base_model.layers]
    fused = FusedCausalLMLoss(model, body)
    for hook in hooks:
        hook.remove()
    assert fused.logit_rule == expected
    assert model.config.num_hidden_layers == 2
    assert torch.isfinite(fused(*packed(samples())))


def _not_here(*_: object) -> None:
    raise AssertionError("its weights are elsewhere")


def test_a_second_backward_pass_is_an_error() -> None:
    """Gradients lie where hidden states did, and are scaled there: a second time they would be wrong."""
    model = model_of("llama")
    loss = FusedCausalLMLoss(model, FusedBody(model, samples_a_row=SAMPLES_A_ROW))(*packed(samples()))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("settings", [{"target_modules": ["o_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_a_trained_head_takes_the_generic_way(settings: dict[str, object]) -> None:
    model = model_of("llama", **settings)
    fused = FusedCausalLMLoss(model, FusedBody(model, samples_a_row=SAMPLES_A_ROW))
    assert not fused.capturable
    batch = packed(samples())
    assert relative_gap(fused(*batch), CausalLMLoss(model)(*batch)) < rounding("llama", "eager")
