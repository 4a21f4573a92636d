from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nybble.adapters.config import LoraConfig
from nybble.adapters.lora import LoRAAdapter, LoRALinear, layer_generator
from nybble.quant.format import NF4Spec
from nybble.quant.linear import DenseLinear, NF4Linear
from nybble.quant.weight import NF4Weight
from tests.adapters.support import randomize

IN, OUT = 64, 48


def base(storage: str = "fp32", compute: torch.dtype = torch.float32, *, bias: bool = True) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, IN, generator=generator) * 0.2
    offset = torch.randn(OUT, generator=generator) if bias else None
    if storage == "nf4":
        return NF4Linear(NF4Weight.quantize(weight, NF4Spec()), offset, compute)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[storage]
    return DenseLinear.from_weight(weight.to(dtype), offset, compute)


def adapted(storage: str = "fp32", compute: torch.dtype = torch.float32, **options: object) -> LoRALinear:
    layer = LoRALinear(base(storage, compute))
    adapter = LoRAAdapter(layer.base, LoraConfig(**({"r": 4, "lora_alpha": 10} | options)), "layer")
    adapter.initialize(layer.base, layer_generator(0, "layer"))
    randomize(dict(adapter.named_parameters()))
    layer.adapters["default"] = adapter
    layer.active = "default"
    return layer


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 7, IN, generator=torch.Generator().manual_seed(2)).to(dtype)


def definition(layer: LoRALinear, x: Tensor) -> Tensor:
    """y = m (W + scaling B A) / ||W + scaling B A|| x + bias in float64, straight from the papers."""
    adapter = layer.adapters["default"]
    W = layer.base.dequantize(torch.float32).double()
    changed = W + adapter.config.scaling * adapter.lora_B.double() @ adapter.lora_A.double()
    if adapter.magnitude is not None:
        changed = changed * (adapter.magnitude.double() / changed.norm(dim=1).detach()).unsqueeze(1)
    return x.double() @ changed.T + layer.base.bias.double()


@pytest.mark.parametrize("storage", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"dtype": "bf16"}])
def test_output_and_gradients_follow_the_definition(storage: str, options: dict[str, object]) -> None:
    layer = adapted(storage, **options)
    x, x_ref = inputs().requires_grad_(), inputs().requires_grad_()
    weights = torch.randn(3, 7, OUT, generator=torch.Generator().manual_seed(4))
    output, expected = layer(x), definition(layer, x_ref)
    torch.testing.assert_close(output, expected.float(), rtol=1e-5, atol=1e-5)
    parameters = list(layer.adapters.parameters())
    ours = torch.autograd.grad((output * weights).sum(), [x, *parameters])
    theirs = torch.autograd.grad((expected * weights).sum(), [x_ref, *parameters])
    for gradient, reference in zip(ours, theirs, strict=True):
        tolerance = 2**-8 if gradient.dtype == torch.bfloat16 else 1e-5
        scale = float(reference.abs().max())
        torch.testing.assert_close(gradient, reference.to(gradient.dtype), rtol=tolerance, atol=tolerance * scale)


def test_only_the_adapter_gets_gradients() -> None:
    layer = adapted("nf4", use_dora=True)
    layer(inputs()).sum().backward()
    trained = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert trained == {"adapters.default.lora_A", "adapters.default.lora_B", "adapters.default.magnitude"}


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_half_precision_errs_no_more_than_twice_pytorch(compute: torch.dtype, options: dict[str, object]) -> None:
    layer = adapted("bf16", compute, **options)
    x = inputs(compute)
    output = layer(x)
    assert output.dtype == compute
    assert {parameter.dtype for parameter in layer.adapters.parameters()} == {torch.float32}
    exact = definition(layer, x)
    adapter = layer.adapters["default"]
    W = (layer.base.weight.float() + adapter.scaling * adapter.lora_B @ adapter.lora_A).detach()
    if adapter.magnitude is not None:
        W = W * (adapter.magnitude / W.norm(dim=1)).unsqueeze(1)
    plain = nn.functional.linear(x, W.to(compute), layer.base.bias.to(compute))
    assert (output.double() - exact).abs().mean() <= 2 * (plain.double() - exact).abs().mean()


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_masks_the_adapters_input_only_in_training(use_dora: bool) -> None:
    layer = adapted(lora_dropout=0.5, use_dora=use_dora)
    layer.eval()
    torch.testing.assert_close(layer(inputs()), definition(layer, inputs()).float(), rtol=1e-5, atol=1e-5)
    layer.train()
    torch.manual_seed(1)
    masked = layer(inputs())
    torch.manual_seed(1)
    x, dropped = inputs(), nn.functional.dropout(inputs(), 0.5)
    expected = layer.base(x) + (definition(layer, dropped) - layer.base(dropped)).float()
    torch.testing.assert_close(masked, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora_dequantizes_once_a_pass(dropout: float) -> None:
    class Counting(NF4Linear):
        calls = 0

        def materialize(self, *stored: Tensor) -> Tensor:
            Counting.calls += 1
            return super().materialize(*stored)

    layer = adapted("nf4", use_dora=True, lora_dropout=dropout)
    layer.base.__class__ = Counting
    output = layer(inputs().requires_grad_())
    assert Counting.calls == 1
    output.sum().backward()
    # Backward materializes for each product: one, and a second where dropout made two.
    assert Counting.calls == (2 if dropout == 0 else 3)


def test_dora_keeps_no_weight_for_the_backward_pass() -> None:
    layer = adapted("nf4", use_dora=True)
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() if tensor.is_floating_point() else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(inputs().requires_grad_())
    assert max(sizes) < OUT * IN


@pytest.mark.parametrize("use_dora", [False, True])
def test_recomputed_activations_give_the_same_gradients(use_dora: bool) -> None:
    layer = adapted("nf4", use_dora=use_dora, lora_dropout=0.3)
    found = []
    for recompute in (False, True):
        x = inputs().requires_grad_()
        torch.manual_seed(0)
        output = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        found.append(torch.autograd.grad(output.square().sum(), [x, *layer.adapters.parameters()]))
    assert all(torch.equal(kept, recomputed) for kept, recomputed in zip(*found, strict=True))


def test_row_norms_in_blocks_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = adapted(use_dora=True)
    adapter, weight = layer.adapters["default"], layer.base.weight
    whole = adapter.row_norms(weight)
    monkeypatch.setattr("nybble.adapters.lora._NORM_BLOCK_BYTES", 5 * 4 * IN)
    torch.testing.assert_close(adapter.row_norms(weight), whole, rtol=1e-6, atol=0)
    changed = weight + adapter.scaling * adapter.lora_B @ adapter.lora_A
    torch.testing.assert_close(whole, changed.norm(dim=1), rtol=1e-6, atol=0)


def test_start_changes_nothing_and_does_not_depend_on_others() -> None:
    layer = LoRALinear(base())
    starts = []
    for path, seed in (("a", 0), ("a", 0), ("b", 0), ("a", 1)):
        adapter = LoRAAdapter(layer.base, LoraConfig(r=4, use_dora=True), path)
        torch.rand(5)  # the global generator has no part in it
        adapter.initialize(layer.base, layer_generator(seed, path))
        layer.adapters["default"], layer.active = adapter, "default"
        torch.testing.assert_close(layer(inputs()), layer.base(inputs()), rtol=1e-5, atol=1e-5)
        starts.append(adapter.lora_A.detach())
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    assert not torch.equal(starts[0], starts[3])
    bound = IN**-0.5
    assert bound * 0.9 < starts[0].abs().max() <= bound
    assert starts[0].std() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_float64_keeps_its_precision() -> None:
    layer = adapted().double()
    layer.base.compute_dtype = torch.float64
    torch.testing.assert_close(layer(inputs().double()), definition(layer, inputs()), rtol=1e-12, atol=1e-12)
