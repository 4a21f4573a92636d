"""Pages: tensors at home and on the device, and that work in buckets reaches all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble.memory.paging import Pages

CPU = torch.device("cpu")


def described() -> list[dict[str, Tensor]]:
    """Two sets: 40 units of 256 values and of one, 7 units of 16 values in fp64."""
    wide = {
        "codes": torch.empty(40 * 256, dtype=torch.uint8, device="meta"),
        "scales": torch.empty(40, dtype=torch.float32, device="meta"),
    }
    return [wide, {"values": torch.empty(7 * 16, dtype=torch.float64, device="meta")}, {"none": torch.empty(0)}]


def make(bucket_bytes: int) -> tuple[Pages, list[dict[str, Tensor]]]:
    """Pages with random values, and copies of these."""
    sets = described()
    pages = Pages(sets, [40, 7, 0], CPU, bucket_bytes=bucket_bytes)
    for tensor in (tensor for tensors in sets for tensor in tensors.values()):
        tensor.copy_(torch.randint(100, tensor.shape))
    return pages, [{name: tensor.clone() for name, tensor in tensors.items()} for tensors in sets]


def assert_equal(sets: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for tensors, others in zip(sets, expected, strict=True):
        assert all(torch.equal(tensors[name], others[name]) for name in others)


def test_home_is_one_buffer_and_begins_each_tensor_at_a_multiple_of_256_bytes() -> None:
    pages, _ = make(1000)
    tensors = [tensor for tensors in pages.sets for tensor in tensors.values() if tensor.numel()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    first = tensors[0].data_ptr()
    assert [tensor.data_ptr() - first for tensor in tensors] == [0, 40 * 256, 40 * 256 + 256]
    assert pages.nbytes == 40 * 256 + 256 + 1024


def test_everything_moves_and_comes_back() -> None:
    pages, values = make(1000)
    home = {name: tensor.data_ptr() for tensors in pages.sets for name, tensor in tensors.items()}
    assert not pages.resident
    assert not pages.evict()
    assert pages.restore_if_room()
    assert pages.resident
    assert_equal(pages.sets, values)
    held = {name: tensor.data_ptr() for tensors in pages.sets for name, tensor in tensors.items()}
    assert all(held[name] != home[name] for name in ("codes", "scales", "values"))
    moves = pages.moves
    pages.sets[0]["codes"].add_(1)
    values[0]["codes"].add_(1)
    assert pages.evict()
    assert pages.moves == moves + 1
    assert {name: tensor.data_ptr() for tensors in pages.sets for name, tensor in tensors.items()} == home
    assert_equal(pages.sets, values)


def test_nothing_moves_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    pages, values = make(1000)
    monkeypatch.setattr("nybble.memory.paging.available_bytes", lambda _: pages.nbytes + 99)
    assert not pages.restore_if_room(headroom_bytes=100)
    assert_equal(pages.sets, values)
    assert pages.restore_if_room(headroom_bytes=99)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("bucket_bytes", [1, 261, 4096, 2**30])
def test_work_on_parts_reaches_everything_once(*, resident: bool, bucket_bytes: int) -> None:
    pages, values = make(bucket_bytes)
    if resident:
        pages.restore_if_room()
    parts = []
    for part in pages.parts():
        parts.append((part.index, part.start, part.stop))
        for name, tensor in part.tensors.items():
            per_unit = values[part.index][name].numel() // (40, 7)[part.index]
            assert tensor.numel() == per_unit * (part.stop - part.start)
            assert torch.equal(tensor, values[part.index][name][part.start * per_unit : part.stop * per_unit])
            tensor.add_(part.start)
            values[part.index][name][part.start * per_unit : part.stop * per_unit].add_(part.start)
    assert_equal(pages.sets, values)
    for index, units in enumerate((40, 7)):
        assert [n for i, start, stop in parts if i == index for n in range(start, stop)] == list(range(units))
    whole = resident or bucket_bytes == 2**30
    assert len(parts) == {True: 2, False: {1: 47, 261: 44, 4096: 4}.get(bucket_bytes)}[whole]
