"""The loss under a head in host memory: that of the head on the device, whatever the chunks."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from nybble.labels import IGNORED
from nybble.memory import host_matrix
from nybble.memory.host_matrix import HostLinear
from nybble.models import streamed_loss
from nybble.models.ends import place_ends
from nybble.models.loss import CausalLMLoss
from nybble.models.skeleton import replace_modules
from nybble.ops.head_chunks import ChunkSizes
from nybble.plan import MemoryPlan
from nybble.quant.format import NF4Spec
from nybble.quant.linear import DenseLinear, NF4Linear
from tests.models.test_loss import LargestTensor, gradients, plain_losses, relative_gap, sample_batch
from tests.tiny import DENSE_KINDS, random_model

CPU = torch.device("cpu")
ON_HOST = MemoryPlan((), embedding="host", head="host")
# Of llama's 408 words of 64 values each in fp64: 128 tokens and 128 words, the smallest chunks there are.
SMALL = 1


def model_of(kind: str, **overrides: object) -> PreTrainedModel:
    model = random_model(kind, **overrides).double()
    replace_modules(model, torch.float64)
    model.requires_grad_(False)
    next(layer for layer in model.modules() if isinstance(layer, torch.nn.ModuleList))[0].requires_grad_(True)
    return model


def long_batch() -> tuple[torch.Tensor, ...]:
    """300 tokens: two chunks of them and a part."""
    return tuple(torch.cat([part] * 5) for part in sample_batch())


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_loss, "CHUNK_BYTES", SMALL)
    monkeypatch.setattr(host_matrix, "_CHUNK_BYTES", SMALL)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", DENSE_KINDS)
def test_value_and_gradients_in_fp64(kind: str) -> None:
    model, batch = model_of(kind), long_batch()
    reference = plain_losses(model, *batch)
    expected = gradients(model, reference.sum())
    place_ends(model, ON_HOST, CPU)
    module = CausalLMLoss(model)
    loss = module(*batch)
    ours = gradients(model, loss)
    assert loss.item() == pytest.approx(reference.sum().item(), rel=1e-13)
    assert ours.keys() == expected.keys()
    assert len(ours) > 3
    assert max(relative_gap(ours[name], expected[name]) for name in expected) < 1e-12
    torch.testing.assert_close(module.token_losses(*batch)[:, 1:], reference.detach(), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert module(*batch).item() == pytest.approx(reference.sum().item(), rel=1e-13)
        logits = model(input_ids=batch[0], position_ids=batch[2], use_cache=False).logits
    assert torch.isfinite(logits).all()


# 128 rows of 72 values are no whole blocks of 2,048: such a head goes in one chunk.
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("hidden", "spec"), [(64, NF4Spec()), (64, NF4Spec(64, 0)), (72, NF4Spec(2048))], ids=str)
@pytest.mark.parametrize("kind", ["llama", "smollm", "gemma2"])
def test_a_head_in_nf4(kind: str, hidden: int, spec: NF4Spec) -> None:
    model, batch = model_of(kind, hidden_size=hidden), long_batch()
    head = NF4Linear.from_linear(model.get_output_embeddings(), spec, torch.float64)
    model.set_output_embeddings(DenseLinear.from_weight(head.dequantize(torch.float64), None, torch.float64))
    expected = gradients(model, plain_losses(model, *batch).sum())
    model.set_output_embeddings(head)
    module = CausalLMLoss(model)
    ours = gradients(model, module(*batch))
    assert module.streamed is not None
    assert len(ours) > 3
    assert max(relative_gap(ours[name], expected[name]) for name in expected if name in ours) < 1e-12
    model.set_output_embeddings(DenseLinear.from_weight(head.dequantize(torch.float64), None, torch.float64))
    expected_losses = plain_losses(model, *batch).detach()
    model.set_output_embeddings(head)
    torch.testing.assert_close(module.token_losses(*batch)[:, 1:], expected_losses, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("small_chunks")
def test_a_head_in_nf4_is_never_whole() -> None:
    model = model_of("llama", vocab_size=5000)
    model.set_output_embeddings(NF4Linear.from_linear(model.lm_head, NF4Spec(), torch.float64))
    ids = torch.arange(300).view(1, 300)
    module, largest = CausalLMLoss(model), LargestTensor()
    model.set_input_embeddings(torch.nn.Embedding(300, 64, dtype=torch.float64))
    with largest:
        module(ids, ids, ids).backward()
    assert largest.numel == 5000 * 64 // 2  # its codes


@pytest.mark.usefixtures("small_chunks")
def test_bias_and_a_factor_on_the_loss() -> None:
    model, batch = model_of("llama"), long_batch()
    bias = torch.nn.Parameter(torch.randn(model.lm_head.out_features, dtype=torch.float64), requires_grad=False)
    model.set_output_embeddings(DenseLinear.from_weight(model.lm_head.weight, bias, torch.float64))
    expected = gradients(model, plain_losses(model, *batch).sum() * 0.125)
    place_ends(model, ON_HOST, CPU)
    ours = gradients(model, CausalLMLoss(model)(*batch) * 0.125)
    assert max(relative_gap(ours[name], expected[name]) for name in expected) < 1e-12


def test_weights_may_be_stored_in_another_dtype() -> None:
    model, batch = model_of("llama"), sample_batch()
    model.lm_head.weight.data = model.lm_head.weight.data.bfloat16()
    expected = CausalLMLoss(model)(*batch)
    place_ends(model, ON_HOST, CPU)
    assert CausalLMLoss(model)(*batch).item() == pytest.approx(expected.item(), rel=1e-12)


def test_no_targets() -> None:
    model = model_of("llama")
    place_ends(model, ON_HOST, CPU)
    ids, labels, positions = sample_batch()
    module = CausalLMLoss(model)
    loss = module(ids, torch.full_like(labels, IGNORED), positions)
    assert loss.item() == 0
    assert all(torch.all(gradient == 0) for gradient in gradients(model, loss).values())


def test_a_second_backward_pass_is_an_error() -> None:
    """Gradients lie where hidden states did, and are scaled there: a second time they would be wrong."""
    model = model_of("llama")
    place_ends(model, ON_HOST, CPU)
    loss = CausalLMLoss(model)(*sample_batch())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.usefixtures("small_chunks")
def test_logits_are_never_held_for_all_tokens_or_all_words() -> None:
    model = model_of("llama", vocab_size=5000)
    place_ends(model, ON_HOST, CPU)
    ids = torch.arange(300).view(1, 300)
    largest = LargestTensor()
    module = CausalLMLoss(model)
    with largest:
        module(ids, ids, ids).backward()
        module.token_losses(ids, ids, ids)
    assert largest.numel == 64 * 5000  # the head itself, where it is named; 128 x 128 logits are smaller


def head_of(vocabulary: int, hidden: int, dtype: torch.dtype = torch.bfloat16) -> HostLinear:
    weight = torch.empty(vocabulary, hidden, dtype=dtype, device="meta")
    return HostLinear.from_weight(weight, None, torch.bfloat16)


def chunks_of(chunk_bytes: int, tokens: int, head: HostLinear) -> ChunkSizes:
    size = head.out_features, head.in_features
    return ChunkSizes.within(chunk_bytes, tokens, *size, value_bytes=2, bytes_a_row=head.bytes_a_row)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 512, 2048, 20_000, 350_000])
@pytest.mark.parametrize(("vocabulary", "hidden"), [(128256, 4096), (128256, 8192), (262144, 2560), (32000, 8192)])
def test_chunks_fit_their_bytes(vocabulary: int, hidden: int, tokens: int, dtype: torch.dtype) -> None:
    head = head_of(vocabulary, hidden, dtype)
    budget = 256 * 2**20
    sizes = chunks_of(budget, tokens, head)
    assert sizes.tokens % 128 == sizes.vocabulary % 128 == 0
    logits = sizes.tokens * sizes.vocabulary * 2
    slots = 2 * sizes.vocabulary * hidden * dtype.itemsize
    cast = 0 if dtype == torch.bfloat16 else sizes.vocabulary * hidden * 2
    assert logits + slots + cast + sizes.tokens * hidden * 6 <= 1.02 * budget  # rounded up to tiles
    assert sizes.tokens * hidden * 6 > budget / 5 or sizes.tokens >= tokens


def test_one_crossing_for_a_short_row() -> None:
    assert chunks_of(256 * 2**20, 2048, head_of(128256, 4096)) == ChunkSizes(2048, 9984)
