"""Linear layers over dense and NF4 weights: outputs, gradients, and what a module must survive."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from nybble.quant.format import NF4Spec
from nybble.quant.linear import DenseEmbedding, DenseLinear, NF4Linear

SPECS = [NF4Spec(64, 4), NF4Spec(32, 0)]
WIDTHS = [64, 40, 33]  # whole blocks, blocks across rows, odd


def nf4(in_features: int, spec: NF4Spec = SPECS[0], compute: torch.dtype = torch.float32) -> NF4Linear:
    return NF4Linear.from_linear(nn.Linear(in_features, 48), spec, compute)


def dense(in_features: int, storage: torch.dtype = torch.bfloat16) -> DenseLinear:
    linear = nn.Linear(in_features, 48).requires_grad_(False).to(storage)
    return DenseLinear.from_linear(linear, torch.float32)


def gradient(forward: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of x for a gradient of the output that rises from -1 to 2."""
    x = x.detach().requires_grad_()
    output = forward(x)
    rising = torch.linspace(-1, 2, output.numel(), device=x.device).bfloat16()  # the same values in every dtype
    output.backward(rising.to(x.dtype).view_as(output))
    return output.detach(), x.grad


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("in_features", WIDTHS)
@pytest.mark.parametrize("compute", [torch.float64, torch.float32], ids=str)
def test_nf4_equals_an_explicit_matmul(spec: NF4Spec, in_features: int, compute: torch.dtype) -> None:
    module = nf4(in_features, spec, compute)
    weight, x = module.dequantize(compute), torch.randn(2, 3, in_features, dtype=compute)
    found = gradient(module, x)
    expected = gradient(lambda x: nn.functional.linear(x, weight, module.bias.to(compute)), x)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dense_equals_an_explicit_matmul(storage: torch.dtype) -> None:
    module = dense(40, storage)
    x = torch.randn(2, 3, 40)
    expected = gradient(lambda x: nn.functional.linear(x, module.weight.float(), module.bias.float()), x)
    for found, right in zip(gradient(module, x), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("module", [nf4(64, compute=torch.bfloat16), dense(64).to(torch.float16)])
def test_input_of_any_dtype_comes_out_in_the_compute_dtype(module: nn.Module) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert module(torch.randn(2, 64, dtype=dtype)).dtype == module.compute_dtype


def test_a_trainable_dense_linear_gets_gradients_in_its_storage_dtype() -> None:
    module = dense(40).requires_grad_()
    x = torch.randn(5, 40)
    module(x).sum().backward()
    assert module.weight.grad.dtype == module.bias.grad.dtype == torch.bfloat16
    expected = x.sum(0).expand(48, 40)
    torch.testing.assert_close(module.weight.grad, expected.bfloat16())


def test_a_frozen_layer_keeps_no_copy_in_the_compute_dtype() -> None:
    for module in (nf4(64), dense(64)):
        saved: list[Tensor] = []
        x = torch.randn(4, 64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t) or t, lambda t: t):
            output = module(x)
        held = {parameter.data_ptr() for parameter in module.parameters()}
        assert {tensor.data_ptr() for tensor in saved} <= held, "only parameters are saved, not what they become"
        output.sum().backward()


def test_backward_reads_the_parameters_as_they_are_then() -> None:
    """FSDP2 frees and refills the storage between the passes."""
    module = nf4(64)
    other = nf4(64)
    x = torch.randn(4, 64, requires_grad=True)
    output = module(x)
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(module.parameters())):
        for mine, theirs in zip(module.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
    output.sum().backward()
    torch.testing.assert_close(x.grad, other.dequantize(torch.float32).sum(0).expand(4, 64))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    model = nn.Sequential(nf4(48), nn.Tanh(), dense(48), nn.Tanh(), nf4(48))
    x = torch.randn(4, 48)
    found = gradient(lambda x: checkpoint(model, x, use_reentrant=reentrant), x)
    for mine, plain in zip(found, gradient(model, x), strict=True):
        assert torch.equal(mine, plain)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("in_features", WIDTHS)
def test_safetensors_round_trip(spec: NF4Spec, in_features: int) -> None:
    module = nf4(in_features, spec)
    room = NF4Linear.empty(in_features, 48, True, spec, torch.float32)
    state = safetensors.torch.load(safetensors.torch.save(module.state_dict()))
    room.load_state_dict(state)
    assert torch.equal(room.dequantize(torch.float32), module.dequantize(torch.float32))
    assigned = NF4Linear.empty(in_features, 48, True, spec, torch.float32, device="meta")
    assigned.load_state_dict(state, assign=True)
    x = torch.randn(2, in_features)
    assert torch.equal(assigned(x), module(x))


def test_bytes_that_begin_anywhere_in_a_file() -> None:
    module, room = nf4(64), nf4(64)
    state = module.state_dict()
    data = torch.zeros(module.group_absmax.numel() + 1, dtype=torch.uint8)
    data[1:] = module.group_absmax.view(-1)
    room.load_state_dict(state | {"group_absmax": data[1:].view(-1, 4)}, assign=True)
    assert torch.equal(room.dequantize(torch.float32), module.dequantize(torch.float32))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_deepcopy_and_casts_leave_the_bytes_alone(spec: NF4Spec) -> None:
    module = nf4(64, spec)
    expected = module.dequantize(torch.float32)
    copied = copy.deepcopy(module).to(torch.float16).half().bfloat16()
    assert copied.codes.data_ptr() != module.codes.data_ptr()
    assert torch.equal(copied.dequantize(torch.float32), expected)
    assert not any(parameter.requires_grad for name, parameter in copied.named_parameters() if name != "bias")


def test_packed_bytes() -> None:
    module = NF4Linear.from_linear(nn.Linear(128, 48), NF4Spec(64, 256), torch.float32)
    assert module.packed_bytes == module.nf4_weight.nbytes == 128 * 48 // 2 + 96 + 4 + 4
    assert module.codes.shape == (48, 64)
    assert "in_features=128, out_features=48, bias=True, block_size=64" in repr(module)


def test_compiles_without_graph_breaks() -> None:
    model = nn.Sequential(nf4(64, NF4Spec()), nn.Tanh(), dense(48))
    x = torch.randn(4, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for found, expected in zip(gradient(compiled, x), gradient(model, x), strict=True):
        torch.testing.assert_close(found, expected)


def test_embedding_returns_the_compute_dtype_and_shares_its_weight() -> None:
    embedding = nn.Embedding(10, 8, padding_idx=2, dtype=torch.bfloat16)
    module = DenseEmbedding.from_embedding(embedding, torch.float32)
    assert module is not None
    assert module.weight is embedding.weight
    assert module.padding_idx == 2
    ids = torch.tensor([[1, 2, 9]])
    assert torch.equal(module(ids), embedding(ids).float())
    module(ids).sum().backward()
    assert embedding.weight.grad[:, 0].tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 1]


def test_embedding_scale_is_applied_in_the_compute_dtype() -> None:
    scale = 640**0.5  # bf16 would round it to 25.25
    embedding = Gemma3TextScaledWordEmbedding(10, 8, 0, embed_scale=scale)
    ids = torch.tensor([[1, 2, 9]])
    module = DenseEmbedding.from_embedding(embedding, torch.float32)
    assert module is not None
    assert torch.equal(module(ids), embedding(ids))
    module.weight.data = module.weight.data.bfloat16()
    expected = module.weight[ids].float() * torch.tensor(scale)
    assert torch.equal(module(ids), expected)


def test_embeddings_that_do_more_are_left_alone() -> None:
    assert DenseEmbedding.from_embedding(BartLearnedPositionalEmbedding(10, 8), torch.float32) is None
    assert DenseEmbedding.from_embedding(nn.Embedding(10, 8, max_norm=1.0), torch.float32) is None


@pytest.mark.gpu
@pytest.mark.parametrize("in_features", [256, 192, 33])
def test_nf4_in_bf16_on_a_gpu(in_features: int) -> None:
    """At most twice the error of PyTorch's own bf16 matmul, both against float64."""
    module = nf4(in_features, NF4Spec(), torch.bfloat16).cuda()
    weight = module.dequantize(torch.bfloat16)
    x = torch.randn(64, in_features, device="cuda", dtype=torch.bfloat16)
    bias = module.bias.bfloat16()
    exact = gradient(lambda x: nn.functional.linear(x, weight.double(), bias.double()), x.double())
    torchs = gradient(lambda x: nn.functional.linear(x, weight, bias), x)
    ours = gradient(module, x)
    for mine, theirs, right in zip(ours, torchs, exact, strict=True):
        assert (mine - right).norm() <= 2 * (theirs - right).norm()
