"""Embedding and head in host memory on a card: right, without waiting, within a graph, and with little memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from nybble.memory.host_matrix import HostLinear
from nybble.models import streamed_loss
from nybble.models.device import compute_device
from nybble.models.ends import place_ends
from nybble.models.fused.body import FusedBody
from nybble.models.fused.loss import FusedCausalLMLoss
from nybble.models.logits import LogitRule
from nybble.models.loss import CausalLMLoss
from nybble.plan import MemoryPlan
from nybble.quant.format import NF4Spec
from nybble.quant.linear import DenseLinear, NF4Linear
from tests.models.fused.test_body import KINDS
from tests.models.fused.test_gpu import batch, error, loss_and_gradients, model_on

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)


def on_host(model: PreTrainedModel, *, activations: str = "keep") -> MemoryPlan:
    """A plan with both ends in host memory, where `model` has them afterwards."""
    plan = replace(MemoryPlan.uniform(2, activations), embedding="host", head="host")
    place_ends(model, plan, CUDA)
    assert model.get_input_embeddings().weight.device.type == "cpu"
    assert model.get_output_embeddings().weight.is_pinned()
    assert compute_device(model) == CUDA
    return plan


def fused(model: PreTrainedModel, plan: MemoryPlan, samples_a_row: int = 4) -> FusedCausalLMLoss:
    return FusedCausalLMLoss(model, FusedBody(model, samples_a_row=samples_a_row, plan=plan))


@pytest.mark.filterwarnings("ignore")  # of compilers, where attention is FlexAttention's: torch 2.11 looks at .grad
@pytest.mark.parametrize("small_chunks", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_errs_no_more_than_twice_the_generic_path(
    kind: str, small_chunks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small_chunks:
        monkeypatch.setattr(streamed_loss, "CHUNK_BYTES", 0)
    inputs = batch(packed=True)
    exact = loss_and_gradients(CausalLMLoss(model_on(kind, torch.float64)), inputs)
    model = model_on(kind, torch.bfloat16)
    generic = loss_and_gradients(CausalLMLoss(model), inputs)
    plan = on_host(model)
    for module in (fused(model, plan), CausalLMLoss(model)):
        assert error(loss_and_gradients(module, inputs), exact) <= 2 * error(generic, exact)
        tokens = module.token_losses(*inputs)
        torch.testing.assert_close(tokens.sum().double() / inputs[0].numel(), exact[0], rtol=1e-2, atol=0)


def test_a_head_in_nf4() -> None:
    """Against its own weights in 16 bits, all against float64."""
    inputs = batch(packed=True)
    quantized = NF4Linear.from_linear(model_on("llama", torch.float64).lm_head.float(), NF4Spec(), torch.bfloat16)

    def with_head(dtype: torch.dtype, *, nf4: bool) -> PreTrainedModel:
        model, weight = model_on("llama", dtype), quantized.dequantize(dtype)
        model.set_output_embeddings(quantized if nf4 else DenseLinear.from_weight(weight, None, dtype))
        return model

    exact = loss_and_gradients(CausalLMLoss(with_head(torch.float64, nf4=False)), inputs)
    whole = loss_and_gradients(CausalLMLoss(with_head(torch.bfloat16, nf4=False)), inputs)
    model = with_head(torch.bfloat16, nf4=True)
    for module in (fused(model, MemoryPlan.uniform(2)), CausalLMLoss(model)):
        assert module.streamed is not None
        found = loss_and_gradients(module, inputs)
        assert error(found, exact) <= 2 * error(whole, exact)


def test_the_stock_model_computes_with_them() -> None:
    model = model_on("qwen2", torch.bfloat16)
    ids = batch(packed=False)[0]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        on_host(model)
        found = model(input_ids=ids, use_cache=False).logits
    assert found.device == expected.device
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6 * expected.abs().max().item())


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_a_step_waits_for_the_device_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_loss, "CHUNK_BYTES", 0)
    inputs = batch(packed=True)
    model = model_on("gemma3_text", torch.bfloat16)
    module = fused(model, on_host(model, activations="offload"))
    module(*inputs).backward()  # kernels are compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(*inputs).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_recorded_step_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_loss, "CHUNK_BYTES", 0)
    inputs = batch(packed=False)
    model = model_on("llama", torch.bfloat16)
    module = fused(model, on_host(model), samples_a_row=1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def step() -> Tensor:
        module.zero_grad(set_to_none=False)
        loss = module(*inputs)
        loss.backward()
        return loss.detach()

    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with torch.cuda.stream(stream):
        for _ in range(2):
            eager = step().clone()
        expected = [parameter.grad.clone() for parameter in parameters]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        recorded = step()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(recorded, eager, rtol=1e-5, atol=0)
    for parameter, gradient in zip(parameters, expected, strict=True):
        # cuDNN's backward pass of attention sums in no fixed order.
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-2, atol=1e-2 * gradient.abs().max().item())


@pytest.mark.usefixtures("own_allocator")
def test_memory_of_the_loss() -> None:
    """Under a head of 262,144 words and 1,024 values, 512 MiB: buffers stay within their bytes."""
    vocabulary, hidden, tokens = 262144, 1024, 4096
    head = HostLinear.from_weight(torch.randn(vocabulary, hidden).bfloat16() / 32, None, torch.bfloat16)
    head = HostLinear.taking(head, CUDA)
    loss = streamed_loss.StreamedLoss(head, LogitRule())
    x = torch.randn(tokens, hidden, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,), device=CUDA)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with loss.coming(tokens) as losses:
        total = losses(x * 1, targets).sum()
    peak = torch.cuda.max_memory_allocated() - before
    (gradient,) = torch.autograd.grad(total, x)
    assert torch.isfinite(gradient).all()
    own = x.nbytes + 2 * 2**20  # hidden states that become their gradient, and what is counted by the token
    workspace = 64 * 2**20  # cuBLAS
    assert peak <= 1.02 * streamed_loss.CHUNK_BYTES + own + workspace
