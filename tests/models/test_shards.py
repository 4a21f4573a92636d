"""Files written tensor by tensor are what safetensors reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from nybble.models.shards import ShardWriter, header_room
from nybble.models.tensorfile import SAFETENSORS_DTYPES, read_entries

TENSORS = {
    "flags": torch.tensor([True, False, True]),
    "odd": torch.arange(13, dtype=torch.uint8),
    "weight": torch.randn(6, 8, generator=torch.Generator().manual_seed(0)),
    "view": torch.arange(12.0).reshape(3, 4).t(),
    "half": torch.arange(5, dtype=torch.bfloat16),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.empty(0, 3),
    "codes": torch.arange(64, dtype=torch.uint8),
}


def write(folder: Path, max_shard_bytes: int) -> ShardWriter:
    with ShardWriter(folder, header_room(list(TENSORS)), max_shard_bytes) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
    return writer


def test_one_file(tmp_path: Path) -> None:
    writer = write(tmp_path, 10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
    assert writer.total_bytes == sum(tensor.nbytes for tensor in TENSORS.values())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_tensor_begins_at_a_multiple_of_its_item_size(tmp_path: Path) -> None:
    write(tmp_path, 10**9)
    entries = read_entries(tmp_path / "model.safetensors")
    assert all(entry.start % entry.dtype.itemsize == 0 for entry in entries.values())


def test_several_files_and_their_index(tmp_path: Path) -> None:
    writer = write(tmp_path, 100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": writer.total_bytes}
    assert index["weight_map"].keys() == TENSORS.keys()
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], TENSORS[name])
    for file in files:
        sizes = [entry.nbytes for entry in read_entries(tmp_path / file).values()]
        assert sum(sizes) <= 100 or len(sizes) == 1


@pytest.mark.parametrize("dtype", SAFETENSORS_DTYPES.values(), ids=str)
def test_every_dtype_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.tensor([1, 0, 1, 1, 0]).to(dtype)
    with ShardWriter(tmp_path, header_room(["tensor"])) as writer:
        writer.add("tensor", tensor)
    ours = read_entries(tmp_path / "model.safetensors")["tensor"].read()
    theirs = load_file(tmp_path / "model.safetensors")["tensor"]
    for read in (ours, theirs):
        assert read.dtype == dtype
        assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


def test_an_error_is_passed_on_and_leaves_no_model(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 10**4)
    with pytest.raises(ValueError, match="stopped"), writer:
        _add_and_stop(writer)
    assert not (tmp_path / "model.safetensors").exists()


def _add_and_stop(writer: ShardWriter) -> None:
    writer.add("tensor", torch.ones(4))
    raise ValueError("stopped")
