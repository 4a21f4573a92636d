"""What is wrong with a checkpoint folder is said before anything is read from it."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nybble.errors import UserError
from nybble.models.checkpoint import Checkpoint
from nybble.models.hub import read_model_config

Tiny = Callable[..., Path]


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    """A checkpoint in one file, to be spoilt."""
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


@pytest.fixture
def sharded(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama", sharded=True), tmp_path / "model"))


def problem(folder: Path | str) -> str:
    with pytest.raises(UserError) as error:
        Checkpoint.open(str(folder))
    return str(error.value)


def set_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_reads_what_safetensors_reads(tiny: Tiny, dtype: str) -> None:
    folder = tiny("qwen2", dtype=dtype)
    checkpoint = Checkpoint.open(str(folder))
    expected = load_file(folder / "model.safetensors")
    assert set(checkpoint.keys) == set(expected)
    assert all(torch.equal(checkpoint.read(key), tensor) for key, tensor in expected.items())
    assert checkpoint.dtype == getattr(torch, dtype)
    assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in expected.values())


def test_positions_by_either_name_and_of_the_text_part(tiny: Tiny, tmp_path: Path) -> None:
    assert Checkpoint.open(str(tiny("gpt2"))).max_positions == 512
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    set_config(folder, max_position_embeddings=None)
    assert Checkpoint.open(str(folder)).max_positions is None
    set_config(folder, text_config={"max_position_embeddings": 96})
    assert Checkpoint.open(str(folder)).max_positions == 96


def test_odd_shapes_are_read(folder: Path) -> None:
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.arange(7, dtype=torch.uint8),
    }
    save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint.open(str(folder))
    assert all(torch.equal(checkpoint.read(key), tensor) for key, tensor in tensors.items())


def test_a_tensor_that_was_read_owns_its_memory(folder: Path) -> None:
    checkpoint = Checkpoint.open(str(folder))
    checkpoint.read("model.norm.weight").fill_(0)
    assert checkpoint.read("model.norm.weight").abs().sum() > 0


def test_fingerprint_is_of_the_weights(tiny: Tiny, folder: Path) -> None:
    first = Checkpoint.open(str(folder)).fingerprint
    assert first == Checkpoint.open(str(tiny("llama", sharded=True))).fingerprint
    assert first != Checkpoint.open(str(tiny("llama", seed=1))).fingerprint
    assert first != Checkpoint.open(str(tiny("llama", dtype="bfloat16"))).fingerprint
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.001
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert first != Checkpoint.open(str(folder)).fingerprint


def test_no_model_here(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in problem(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "This folder holds an adapter" in problem(folder)
    with pytest.raises(UserError, match="This folder holds an adapter"):
        read_model_config(str(folder))
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "adapter_config.json").write_text("{}")
    assert "This folder holds an adapter" in problem(run)
    full = tmp_path / "full"
    (full / "model").mkdir(parents=True)
    (full / "model" / "config.json").write_text("{}")
    assert f"give {full / 'model'}" in problem(full)
    assert "is a file" in problem(folder / "model.safetensors")
    assert "neither a folder here nor" in problem(tmp_path / "absent")


def test_unknown_hub_ids(folder: Path) -> None:
    assert "hub cannot be reached" in problem("nobody/no-such-model")
    assert "nor a model id" in problem("nobody/no/such model")
    with pytest.raises(UserError, match="no revisions"):
        Checkpoint.open(str(folder), "main")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in problem(folder)
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert "pickle files only (pytorch_model.bin)" in problem(folder)


def test_truncated_files(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    assert "model.safetensors: is truncated: 1,000 bytes are missing" in problem(folder)
    file.write_bytes(whole[:100])
    assert "is truncated" in problem(folder)
    file.write_bytes(b"")
    assert "is truncated" in problem(folder)


def test_corrupt_headers(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 8) + b"no json!" + bytes(100))
    assert "header is corrupt" in problem(folder)
    for entry in (
        {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32"},
    ):
        header = json.dumps({"w": entry}).encode()
        file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))
        assert "tensor 'w'" in problem(folder)


def test_all_shards_that_are_missing_or_short_are_named(sharded: Path) -> None:
    first, second, *_ = sorted(sharded.glob("model-*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-8])
    text = problem(sharded)
    assert f"{first.name}: no such file" in text
    assert f"{second.name}: is truncated: 8 bytes" in text


def test_an_index_that_names_absent_tensors(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = next(iter(index["weight_map"].values()))
    index["weight_map"]["model.layers.7.mlp.up_proj.weight"] = file
    path.write_text(json.dumps(index))
    assert "lack: model.layers.7.mlp.up_proj.weight" in problem(sharded)
    index["weight_map"] = {"w": "../elsewhere.safetensors"}
    path.write_text(json.dumps(index))
    assert "outside its folder" in problem(sharded)
    path.write_text("[]")
    assert "no weight_map" in problem(sharded)


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes int8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes fp4"),
    ],
)
def test_other_quantizations_are_refused(folder: Path, quantization: dict[str, object], name: str) -> None:
    set_config(folder, quantization_config=quantization)
    text = problem(folder)
    assert f"quantized by {name};" in text
    assert "16-bit checkpoint" in text
