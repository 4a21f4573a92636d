"""A saved model is what Transformers loads, by the names the checkpoint had."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from nybble.errors import UserError
from nybble.models import save
from nybble.models.config import ModelConfig
from nybble.models.load import LoadedModel, load_model
from nybble.models.save import save_full_model
from nybble.models.shards import ShardWriter

Tiny = Callable[..., Path]

IDS = torch.randint(4, 400, (2, 20), generator=torch.Generator().manual_seed(0))


def load(folder: Path, storage: str = "fp32") -> LoadedModel:
    return load_model(ModelConfig(name=str(folder)), device=torch.device("cpu"), storage=storage)


def trained(folder: Path) -> LoadedModel:
    """A model whose weights all moved a little."""
    loaded = load(folder)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.01)
    return loaded


@pytest.mark.parametrize("kind", ["gpt2", "smollm", "phi3", "qwen2", "gemma3_text", "mixtral"])
def test_transformers_loads_the_same_weights(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    loaded = trained(tiny(kind))
    save_full_model(loaded.model, tmp_path / "saved", loaded.tokenizer, torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, loaded.model(IDS).logits)
        assert torch.equal(load(tmp_path / "saved").model(IDS).logits, loaded.model(IDS).logits)
    saved, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "saved", tiny(kind)))
    assert {key: tensor.shape for key, tensor in saved.items()} == {key: value.shape for key, value in original.items()}


def test_weights_are_rounded_once_and_settings_come_along(tiny: Tiny, tmp_path: Path) -> None:
    loaded = trained(tiny("llama"))
    save_full_model(loaded.model, tmp_path / "saved", loaded.tokenizer, torch.bfloat16)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.dtype == torch.bfloat16
    weight = loaded.model.model.layers[1].mlp.up_proj.weight
    assert torch.equal(again.model.layers[1].mlp.up_proj.weight, weight.to(torch.bfloat16))
    assert again.generation_config.eos_token_id == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer.chat_template == loaded.tokenizer.chat_template
    assert loaded.model.config.dtype == torch.float32  # the model in memory is as it was


def test_shards_have_an_index(tiny: Tiny, tmp_path: Path) -> None:
    loaded = trained(tiny("llama"))
    save_full_model(loaded.model, tmp_path / "saved", loaded.tokenizer, torch.float32, max_shard_bytes=100_000)
    assert len(list((tmp_path / "saved").glob("model-*-of-*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(again(IDS).logits, loaded.model(IDS).logits)


class _BadDisk(ShardWriter):
    """Changes one value of one tensor, as a disk may."""

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if name.endswith("1.mlp.up_proj.weight"):
            tensor = tensor.clone()
            tensor[3, 5] += 1
        super().add(name, tensor)


def test_what_was_written_is_read_back_and_compared(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(tiny("llama"))
    monkeypatch.setattr(save, "ShardWriter", _BadDisk)
    with pytest.raises(UserError, match=r"not what was held:\n  model\.layers\.1\.mlp\.up_proj\.weight\nCheck"):
        save_full_model(loaded.model, tmp_path / "saved", loaded.tokenizer, torch.bfloat16)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("kind", ["gpt2", "smollm"])
def test_a_sharded_model_is_gathered(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    loaded = trained(tiny(kind))
    save_full_model(loaded.model, tmp_path / "whole", loaded.tokenizer, torch.float32)
    fully_shard(loaded.model, mesh=init_device_mesh("cpu", (1,)))
    save_full_model(loaded.model, tmp_path / "absent", loaded.tokenizer, torch.float32, write=False)
    assert not (tmp_path / "absent").exists()
    save_full_model(loaded.model, tmp_path / "sharded", loaded.tokenizer, torch.float32)
    whole, sharded = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "sharded"))
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(sharded[key], tensor) for key, tensor in whole.items())


def test_nothing_is_overwritten(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    loaded = load(tiny("smollm"))
    with pytest.raises(UserError, match="already exists"):
        save_full_model(loaded.model, tmp_path / "saved", loaded.tokenizer, torch.float32)
    assert list(tmp_path.iterdir()) == [tmp_path / "saved"]


def test_quantized_weights_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    loaded = load(tiny("smollm"), "nf4")
    with pytest.raises(UserError, match=r"q_proj is held in 4 bit"):
        save_full_model(loaded.model, tmp_path / "saved", loaded.tokenizer, torch.float32)
