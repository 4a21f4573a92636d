"""Stock models with streamed layers compute what they compute with resident ones, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from nybble.adapters.config import LoraConfig
from nybble.adapters.inject import adapter_parameters, inject
from nybble.memory.stock_layers import call_before_use, frozen_weights
from nybble.memory.stream import LayerStream
from nybble.models.loss import CausalLMLoss
from nybble.models.skeleton import decoder_layers, replace_modules
from nybble.quant.format import NF4Spec
from nybble.quant.linear import DenseLinear, NF4Linear
from nybble.train.activation_checkpointing import enable_activation_checkpointing
from tests.tiny import VOCAB_SIZE, random_model

CPU = torch.device("cpu")
NUM_LAYERS = 5


def model_of(kind: str, storage: str) -> PreTrainedModel:
    no_dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    model = random_model(kind, num_hidden_layers=NUM_LAYERS, **(no_dropout if kind == "gpt2" else {}))
    replace_modules(model, torch.float32)
    model.requires_grad_(False)
    for path, linear in [(p, m) for p, m in model.named_modules() if isinstance(m, DenseLinear) and "lm_head" not in p]:
        if storage == "nf4":
            model.set_submodule(path, NF4Linear.from_linear(linear, NF4Spec(64, 4), torch.float32))
        elif storage == "bf16":
            linear.weight.data = linear.weight.detach().bfloat16()
    inject(model, LoraConfig(r=4, lora_alpha=6, dtype="fp32"))
    for number, (_, parameter) in enumerate(sorted(adapter_parameters(model).items())):
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1
    return model.train()


def loss_and_gradients(model: PreTrainedModel) -> list[Tensor]:
    model.zero_grad()
    ids = torch.randint(3, VOCAB_SIZE, (2, 17), generator=torch.Generator().manual_seed(0))
    loss = CausalLMLoss(model)(ids, ids, torch.arange(17).expand(2, 17))
    loss.backward()
    gradients = [parameter.grad for parameter in adapter_parameters(model).values()]
    return [loss.detach(), *(gradient.clone() for gradient in gradients if gradient is not None)]


def streamed(model: PreTrainedModel, *, on_disk: bool) -> LayerStream:
    layers = list(decoder_layers(model).values())
    chosen = {index: layers[index] for index in (0, 1, 3, 4)}
    weights = {index: frozen_weights(layer) for index, layer in chosen.items()}
    stream = LayerStream(weights, CPU, on_disk=weights if on_disk else ())
    for slot in stream.slots:
        slot.fill_(0xFF)
    call_before_use(stream, chosen)
    return stream


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("storage", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_streamed_layers_give_the_same_bits(kind: str, storage: str, recompute: bool) -> None:
    expected = loss_and_gradients(model_of(kind, storage))
    model = model_of(kind, storage)
    if recompute:
        enable_activation_checkpointing(model)
    stream = streamed(model, on_disk=storage == "nf4")
    for _ in range(2):
        found = loss_and_gradients(model)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert stream.on_device == [0, 1]
        for slot in stream.slots:  # whatever is read by a layer that is not there gives NaN
            slot.fill_(0xFF)
        stream.ready(3)
        stream.ready(4)
