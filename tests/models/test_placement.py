"""Weights that a plan has off the device are loaded to where it wants them, with the same values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nybble.errors import UserError
from nybble.export.quantized import quantize_checkpoint
from nybble.models.checkpoint import Checkpoint
from nybble.models.config import ModelConfig
from nybble.models.load import load_model
from nybble.models.placement import Placement
from nybble.plan import LayerPolicy, MemoryPlan
from nybble.quant.format import NF4Spec
from nybble.quant.linear import NF4Linear
from tests.tiny import random_model

Tiny = Callable[..., Path]

CPU = torch.device("cpu")
IDS = torch.randint(4, 400, (2, 20), generator=torch.Generator().manual_seed(0))


def plan(*weights: str, ends: str = "device") -> MemoryPlan:
    layers = tuple(LayerPolicy(weights=held) for held in weights)  # type: ignore[arg-type]
    return MemoryPlan(layers, embedding=ends, head=ends)  # type: ignore[arg-type]


def load(folder: Path, plan: MemoryPlan | None, device: torch.device = CPU, storage: str | None = None) -> nn.Module:
    return load_model(ModelConfig(name=str(folder)), device=device, storage=storage, plan=plan).model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def is_mapped(tensor: Tensor, folder: Path) -> bool:
    """Whether its memory is a file's in `folder`, as the kernel says."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(address, 16) for address in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return str(folder) in line
    return False


@pytest.fixture(scope="module")
def quantized(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "nf4"
    checkpoint = Checkpoint.open(str(tiny("llama", dtype="bfloat16")))
    quantize_checkpoint(checkpoint, folder, NF4Spec(64, 256), device=CPU)
    return folder


def test_places_are_those_of_the_plan() -> None:
    model = random_model("llama", num_hidden_layers=3)
    placement = Placement.of(model, plan("resident", "streamed", "disk", ends="host"))
    places = {
        "model.layers.0.mlp.up_proj": "device",
        "model.layers.1.mlp.up_proj": "host",
        "model.layers.1": "host",
        "model.layers.2.self_attn.q_proj": "disk",
        "model.norm": "device",
        "model.embed_tokens": "host",
        "lm_head": "host",
    }
    assert {path: placement.at(path) for path in places} == places
    assert Placement.of(model, None).at("model.layers.1.mlp.up_proj") == "device"


def test_a_model_without_a_list_of_its_layers_is_loaded_as_a_whole() -> None:
    model = random_model("llama", num_hidden_layers=2)
    model.model.layers = nn.Sequential(*model.model.layers)
    assert Placement.of(model, plan("resident", "resident")).at("model.layers.1.mlp.up_proj") == "device"


def test_gpt2_has_its_layers_elsewhere() -> None:
    placement = Placement.of(random_model("gpt2"), plan("resident", "streamed"))
    assert placement.at("transformer.h.0.mlp.c_fc") == "device"
    assert placement.at("transformer.h.1.mlp.c_fc") == "host"


@pytest.mark.parametrize("storage", ["bf16", "nf4", "fp32"])
@pytest.mark.parametrize("kind", ["llama", "smollm", "phi3", "gpt2", "mixtral"])
def test_values_do_not_depend_on_the_place(tiny: Tiny, kind: str, storage: str) -> None:
    folder = tiny(kind, dtype="bfloat16")
    expected = load(folder, None, storage=storage).state_dict()
    found = load(folder, plan("streamed", "resident", ends="host"), storage=storage).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("storage", ["bf16", "nf4"])
def test_layers_on_disk_stay_in_the_files(tiny: Tiny, quantized: Path, storage: str) -> None:
    folder = quantized if storage == "nf4" else tiny("llama", dtype="bfloat16")
    model = load(folder, plan("resident", "disk"))
    assert torch.equal(logits(model), logits(load(folder, None)))
    linear = model.model.layers[1].mlp.up_proj
    held = [linear.codes, linear.absmax] if isinstance(linear, NF4Linear) else [linear.weight]
    assert all(is_mapped(tensor, folder) for tensor in held)
    assert not is_mapped(model.model.layers[1].input_layernorm.weight, folder)
    assert not any(is_mapped(tensor, folder) for tensor in model.model.layers[0].parameters())


def test_what_is_written_to_a_mapped_weight_does_not_reach_the_file(quantized: Path) -> None:
    before = (quantized / "model.safetensors").read_bytes()
    load(quantized, plan("disk", "disk")).model.layers[1].mlp.up_proj.codes.fill_(0)
    assert (quantized / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("kind", "dtype", "storage"),
    [("llama", "bfloat16", "nf4"), ("llama", "float32", "bf16"), ("gpt2", "bfloat16", "bf16")],
)
def test_layers_on_disk_must_be_there_as_they_are_held(tiny: Tiny, kind: str, dtype: str, storage: str) -> None:
    with pytest.raises(UserError, match=rf"not in {storage} in the checkpoint's files.*[\s\S]*nybble quantize"):
        load(tiny(kind, dtype=dtype), plan("resident", "disk"), storage=storage)


def test_layers_in_4_bit_on_disk_are_not_read_as_16_bit_ones(quantized: Path) -> None:
    with pytest.raises(UserError, match="not in bf16 in the checkpoint's files"):
        load(quantized, plan("resident", "disk"), storage="bf16")


@pytest.mark.gpu
@pytest.mark.parametrize("source", ["16 bit", "4 bit"])
def test_the_device_holds_what_the_plan_leaves_there(tiny: Tiny, quantized: Path, source: str) -> None:
    folder = quantized if source == "4 bit" else tiny("llama", dtype="bfloat16")
    expected = load(folder, None, storage="nf4").state_dict()
    model = load(folder, plan("resident", "streamed", ends="host"), torch.device("cuda"), storage="nf4")
    for name, parameter in model.named_parameters():
        is_weight = name.endswith((".codes", ".absmax", ".group_absmax", ".offset"))
        on_host = (".layers.1." in name and is_weight) or "embed_tokens" in name or "lm_head" in name
        assert parameter.device.type == ("cpu" if on_host else "cuda"), name
        found, wanted = parameter.cpu(), expected[name]
        if name.endswith((".group_absmax", ".offset")):  # a card sums the blocks' maxima in another order
            values = found.clone().view(torch.float32)
            torch.testing.assert_close(values, wanted.clone().view(torch.float32), rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(found, wanted), name


@pytest.mark.gpu
@pytest.mark.usefixtures("own_allocator")
def test_what_needs_no_change_goes_past_the_device(quantized: Path) -> None:
    load(quantized, None, torch.device("cuda"))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load(quantized, plan("streamed", "streamed", ends="host"), torch.device("cuda"))
    on_device = [tensor for tensor in [*model.parameters(), *model.buffers()] if tensor.device.type == "cuda"]
    # The allocator's unit is 512 bytes.
    most = sum(-(-tensor.nbytes // 512) * 512 for tensor in on_device) + 2**14
    assert torch.cuda.max_memory_allocated() - before <= most
