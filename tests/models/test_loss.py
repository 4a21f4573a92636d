"""The chunked loss against plain Transformers: value, gradients, memory, and every kind of head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from nybble.errors import UserError
from nybble.labels import IGNORED
from nybble.models.logits import LogitRule
from nybble.models.loss import CausalLMLoss
from nybble.quant.format import NF4Spec
from nybble.quant.linear import DenseLinear, NF4Linear
from tests.tiny import DENSE_KINDS, VOCAB_SIZE, random_model

BATCH, SEQ_LEN = 3, 20
FEW_ROWS = 4 * VOCAB_SIZE * 7  # bytes of seven rows of logits: targets do not divide evenly into chunks


def sample_batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, labels with about half the tokens as targets, position_ids: (3, 20)."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB_SIZE, (BATCH, SEQ_LEN), generator=generator)
    ignored = torch.rand(BATCH, SEQ_LEN, generator=generator) < 0.5
    labels = input_ids.masked_fill(ignored, IGNORED)
    return input_ids, labels, torch.arange(SEQ_LEN).expand(BATCH, -1)


def plain_losses(model: PreTrainedModel, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> Tensor:
    """The textbook computation, all logits at once: (batch, seq_len - 1)."""
    logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
    return cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=IGNORED)


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def relative_gap(ours: Tensor, reference: Tensor) -> float:
    return ((ours - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("kind", DENSE_KINDS)
def test_value_and_all_gradients_in_fp64(kind: str) -> None:
    """Full fine-tuning: with tied embeddings the gradients of embedding and head add up."""
    model = random_model(kind).double()
    batch = sample_batch()
    reference = plain_losses(model, *batch).sum()
    expected = gradients(model, reference)
    loss = CausalLMLoss(model, chunk_bytes=FEW_ROWS)(*batch)
    ours = gradients(model, loss)
    assert loss.item() == pytest.approx(reference.item(), rel=1e-13)
    assert ours.keys() == expected.keys()
    assert max(relative_gap(ours[name], expected[name]) for name in expected) < 1e-12


def test_a_factor_on_the_loss_reaches_every_gradient() -> None:
    model = random_model("smollm").double()
    module = CausalLMLoss(model, chunk_bytes=FEW_ROWS)
    once = gradients(model, module(*sample_batch()))
    scaled = gradients(model, module(*sample_batch()) * 0.125)
    assert all(torch.equal(scaled[name], 0.125 * once[name]) for name in once)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_token_and_sequence_losses(kind: str) -> None:
    model = random_model(kind).double()
    input_ids, labels, position_ids = sample_batch()
    module = CausalLMLoss(model, chunk_bytes=FEW_ROWS)
    expected = plain_losses(model, input_ids, labels, position_ids)
    tokens = module.token_losses(input_ids, labels, position_ids)
    assert tokens.shape == labels.shape
    assert not tokens.requires_grad
    torch.testing.assert_close(tokens[:, 1:], expected, rtol=1e-12, atol=1e-12)
    assert torch.all(tokens[:, 0] == 0)
    sequences = module.sequence_losses(input_ids, labels, position_ids)
    torch.testing.assert_close(sequences, expected.sum(1), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert module(input_ids, labels, position_ids).item() == pytest.approx(expected.sum().item(), rel=1e-13)


def test_a_batch_without_targets_gives_zero_loss_and_zero_gradients() -> None:
    input_ids, labels, position_ids = sample_batch()
    model = random_model("smollm")
    module = CausalLMLoss(model)
    nothing = torch.full_like(labels, IGNORED)
    loss = module(input_ids, nothing, position_ids)
    assert loss.item() == 0.0
    found = gradients(model, loss)
    assert found.keys() == dict(model.named_parameters()).keys()  # DDP waits for each of them
    assert all(torch.all(grad == 0) for grad in found.values())
    assert torch.all(module.token_losses(input_ids, nothing, position_ids) == 0)


class LowRankHead(nn.Module):
    """A frozen head with a trained pair beside it and dropout in front of the pair, as LoRA has them."""

    def __init__(self, base: nn.Module, rank: int = 3) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        generator = torch.Generator().manual_seed(1)
        self.a = nn.Parameter(torch.randn(rank, 64, generator=generator) * 0.1)
        self.b = nn.Parameter(torch.randn(VOCAB_SIZE, rank, generator=generator) * 0.1)
        self.unused = nn.Parameter(torch.ones(2))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 1.7 * (self.dropout(x) @ self.a.T @ self.b.T)


HEADS = {
    "frozen": lambda head: head.requires_grad_(False),
    "trained": lambda head: head,
    "dense bf16": lambda head: DenseLinear.from_linear(head.bfloat16().requires_grad_(False), torch.float32),
    "nf4": lambda head: NF4Linear.from_linear(head, NF4Spec(), torch.float32),
    "low rank on nf4": lambda head: LowRankHead(NF4Linear.from_linear(head, NF4Spec(), torch.float32)),
}


@pytest.mark.parametrize("head", HEADS)
def test_heads_of_every_kind(head: str) -> None:
    model = random_model("qwen3").requires_grad_(False)
    model.model.layers[0].mlp.up_proj.requires_grad_(True)
    model.lm_head.requires_grad_(True)
    model.set_output_embeddings(HEADS[head](model.lm_head).eval())
    batch = sample_batch()
    expected = gradients(model, plain_losses(model, *batch).sum())
    ours = gradients(model, CausalLMLoss(model, chunk_bytes=FEW_ROWS)(*batch))
    assert ours.keys() == expected.keys()
    # fp32 sums of ~30 targets in another order: a few roundings of 6e-8.
    assert max(relative_gap(ours[name], expected[name]) for name in expected) < 2e-6


def test_dropout_in_the_head_is_drawn_once_for_value_and_gradient() -> None:
    model = random_model("llama").double().requires_grad_(False)
    model.set_output_embeddings(LowRankHead(model.lm_head).double())
    module = CausalLMLoss(model, chunk_bytes=FEW_ROWS).train()
    batch = sample_batch()
    parameter = model.lm_head.b

    def loss_at(step: float) -> float:
        torch.manual_seed(3)
        with torch.no_grad():
            parameter[5, 1] += step
            value = module(*batch).item()
            parameter[5, 1] -= step
        return value

    torch.manual_seed(3)
    slope = gradients(model, module(*batch))["lm_head.b"][5, 1].item()
    assert slope == pytest.approx((loss_at(1e-5) - loss_at(-1e-5)) / 2e-5, rel=1e-6)


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any result of an operation has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("trained", [False, True])
def test_logits_are_never_held_for_all_tokens(trained: bool) -> None:
    vocab_size, tokens = 5000, 128
    model = random_model("llama", vocab_size=vocab_size).requires_grad_(trained)
    model.model.layers[0].requires_grad_(True)
    module = CausalLMLoss(model, chunk_bytes=4 * vocab_size * 10)
    input_ids = torch.arange(tokens).view(2, 64)
    batch = (input_ids, input_ids, torch.arange(64).expand(2, -1))
    largest = LargestTensor()
    with largest:
        module(*batch).backward()
        module.token_losses(*batch)
        with torch.no_grad():
            module(*batch)
    assert largest.numel == vocab_size * 64  # the head's weight itself; ten rows of logits are smaller
    assert largest.numel < vocab_size * tokens


def test_logit_scales_of_other_architectures() -> None:
    """Granite divides, Cohere multiplies, and Gemma 2 caps."""
    small = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    small |= {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    for config, rule in [
        (transformers.GraniteConfig(**small, logits_scaling=8.0), LogitRule(1 / 8)),
        (transformers.CohereConfig(**small, logit_scale=0.0625), LogitRule(0.0625)),
    ]:
        module = CausalLMLoss(transformers.AutoModelForCausalLM.from_config(config))
        assert module.logit_rule == rule
        assert module.vocab_size == 300
    assert CausalLMLoss(random_model("gemma2")).logit_rule == LogitRule(1.0, 30.0)


@pytest.mark.parametrize("head", ["nf4", "frozen"])
def test_the_head_is_not_multiplied_for_its_rule(head: str) -> None:
    """Whole and in 16 bits it may be larger than all that the plan leaves room for."""
    model = random_model("gemma2", vocab_size=5000)
    model.set_output_embeddings(HEADS[head](model.lm_head))
    held = model.get_output_embeddings()
    largest = LargestTensor()
    with largest:
        module = CausalLMLoss(model)
    assert module.logit_rule == LogitRule(1.0, 30.0)
    assert model.get_output_embeddings() is held
    assert largest.numel < 2 * 8 * 5000 < 5000 * 64  # logits of the few tokens that are tried, and a weight


class Halved(transformers.LlamaForCausalLM):
    """A model whose logits no setting explains."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 2
        return output


class Capped(transformers.LlamaForCausalLM):
    """A model with a soft cap that no setting names."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        output = super().forward(*arguments, **options)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unknown_cap_is_refused_however_small_the_logits_are(dtype: torch.dtype) -> None:
    capped = Capped(random_model("llama").config).to(dtype)
    with torch.no_grad():
        capped.model.norm.weight *= 0.01
    with pytest.raises(UserError, match="Capped makes its logits in a way"):
        CausalLMLoss(capped)


def test_unknown_logits_are_refused_and_nothing_is_disturbed() -> None:
    model = random_model("llama").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    randomness = torch.get_rng_state()
    CausalLMLoss(model)
    assert torch.equal(torch.get_rng_state(), randomness)
    assert [module.training for module in model.modules()] == modes
    halved = Halved(model.config)
    head = halved.lm_head
    with pytest.raises(UserError, match="Halved makes its logits in a way"):
        CausalLMLoss(halved)
    assert halved.lm_head is head


def test_bf16_logits_are_summed_in_fp32() -> None:
    model = random_model("llama").bfloat16()
    batch = sample_batch()
    loss = CausalLMLoss(model)(*batch)
    assert loss.dtype == torch.float32
    logits = model(input_ids=batch[0]).logits.float()
    expected = cross_entropy(logits[:, :-1].transpose(1, 2), batch[1][:, 1:], reduction="sum", ignore_index=IGNORED)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
