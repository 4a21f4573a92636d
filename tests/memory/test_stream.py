"""A stream's layers are whole when they are ready, come in the order of use, and are away otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nybble.memory.stream import LayerStream
from nybble.models.fused.stacked import joined

CPU = torch.device("cpu")

# Of one layer: two matrices that are used as one, NF4's kinds of tensors, odd and empty ones.
KINDS = [
    ((8, 64), torch.bfloat16),
    ((4, 64), torch.bfloat16),
    ((5, 7), torch.uint8),
    ((3, 4), torch.uint8),
    ((1,), torch.float32),
    ((0, 4), torch.uint8),
    ((9,), torch.float16),
]


def parameters(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(0, 256, shape, generator=generator).to(dtype) for shape, dtype in KINDS]
    return [nn.Parameter(tensor, requires_grad=False) for tensor in drawn]


def layers_of(*indices: int) -> tuple[dict[int, list[nn.Parameter]], dict[int, list[Tensor]]]:
    """Parameters by layer, of different sizes from layer to layer, and copies of them."""
    layers = {index: parameters(index) + parameters(100 + index)[: index % 3] for index in indices}
    return layers, {index: [parameter.detach().clone() for parameter in held] for index, held in layers.items()}


def same(held: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(tensor, other) for tensor, other in zip(held, expected, strict=True))


def in_slots(stream: LayerStream, held: Sequence[Tensor]) -> bool:
    """Whether all that has bytes lies on the device."""
    places = {slot.untyped_storage().data_ptr() for slot in stream.slots}
    return all(tensor.untyped_storage().data_ptr() in places for tensor in held if tensor.numel())


@pytest.fixture(params=["host", "disk"])
def place(request: pytest.FixtureRequest) -> str:
    return request.param


def stream_of(layers: dict[int, list[nn.Parameter]], place: str, slots: int) -> LayerStream:
    stream = LayerStream(layers, CPU, slots=slots, on_disk=layers if place == "disk" else ())
    for slot in stream.slots:
        slot.fill_(0xFF)  # NaN in every floating-point dtype
    return stream


def training_pass(indices: Sequence[int]) -> list[int]:
    """Each layer is used several times in a row, as its products come."""
    return [index for index in [*indices, *reversed(indices)] for _ in range(3)]


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 5, 9])
def test_layers_are_whole_in_any_order_of_use(place: str, slots: int) -> None:
    indices = [1, 2, 5, 6, 9, 11]
    layers, expected = layers_of(*indices)
    stream = stream_of(layers, place, slots)
    jumps = torch.randint(0, len(indices), (40,)).tolist()
    order = [*training_pass(indices) * 2, *indices, *indices, *(indices[jump] for jump in jumps)]
    for index in order:
        stream.ready(index)
        assert in_slots(stream, layers[index])
        assert same(layers[index], expected[index])
        assert index in stream.on_device


def test_those_to_come_are_on_their_way_in_both_directions(place: str) -> None:
    layers, _ = layers_of(*range(6))
    stream = stream_of(layers, place, 2)
    seen = []
    for index in [*range(6), *reversed(range(6)), 0, 1]:
        stream.ready(index)
        seen.append(stream.on_device)
    there = [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [4, 5]]
    back = [[4, 5], [3, 4], [2, 3], [1, 2], [0, 1], [0, 1]]
    assert seen == [*there, *back, [0, 1], [1, 2]]


def test_a_pass_without_a_backward_pass_begins_anew(place: str) -> None:
    layers, _ = layers_of(*range(6))
    stream = stream_of(layers, place, 3)
    for index in [*range(6), 0]:
        stream.ready(index)
    assert stream.on_device == [0, 1, 2]


def test_layers_of_one_span_come_and_go_together(place: str) -> None:
    layers, expected = layers_of(*range(7))
    stream = LayerStream(layers, CPU, slots=2, span=2, on_disk=layers if place == "disk" else ())
    back_again = [4, 5, 5, 4, 2, 3, 3, 2, 0, 1, 1, 0]  # each span is made again, then goes through its backward pass
    seen = []
    for index in [*range(7), 6, *back_again]:
        stream.ready(index)
        assert same(layers[index], expected[index])
        seen.append(stream.on_device)
    # With [4, 5] in use, [2, 3] is on its way already, and so on.
    assert seen[:8] == [[0, 1, 2, 3]] * 2 + [[2, 3, 4, 5]] * 2 + [[4, 5, 6]] * 4
    assert seen[8:] == [[2, 3, 4, 5]] * 4 + [[0, 1, 2, 3]] * 8


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_what_is_still_there_is_not_copied_again(place: str, slots: int) -> None:
    layers, expected = layers_of(*range(7))
    stream = stream_of(layers, place, slots)
    passes = [range(7), range(7)[::-1]] * 2
    for number, indices in enumerate(passes):
        for index in indices:
            stream.ready(index)
            left_before = number > 0 and index in list(indices)[:slots]
            assert same(layers[index], expected[index]) != left_before
        for slot in stream.slots:
            slot.fill_(0x11)  # by this it is known again


def test_away_from_the_device_they_are_whole_at_home(place: str) -> None:
    layers, expected = layers_of(*range(5))
    stream = stream_of(layers, place, 2)
    for index in [0, 1, 2]:
        stream.ready(index)
    for slot in stream.slots:
        slot.fill_(0xFF)
    assert stream.on_device == [2, 3]
    assert in_slots(stream, layers[2])
    for index in [0, 1, 3, 4]:  # 3 is on its way, and nobody has waited for it
        assert not in_slots(stream, layers[index])
        assert same(layers[index], expected[index])


def test_host_memory_is_one_piece_a_layer_in_the_order_given() -> None:
    layers, _ = layers_of(0, 2)
    stream = LayerStream(layers, CPU)
    ends = []
    for held in layers.values():
        assert len({parameter.untyped_storage().data_ptr() for parameter in held}) == 1
        begins = [parameter.storage_offset() * parameter.element_size() for parameter in held]
        starts = [begin - begins[0] for begin in begins]
        assert starts == sorted(starts)
        assert all(start % 256 == 0 for start in starts)
        ends.append(max(start + parameter.nbytes for start, parameter in zip(starts, held, strict=True)))
        assert ends[-1] < sum(parameter.nbytes + 256 for parameter in held)
    whole = sum(-(-end // 256) * 256 for end in ends)
    assert stream.host_bytes == whole
    assert stream.device_bytes == whole  # two slots for two layers
    stream.ready(0)
    as_one = joined(layers[0][:2])
    assert as_one is not None
    assert torch.equal(as_one, torch.cat(layers[0][:2]))


def test_a_parameter_given_twice_is_held_once() -> None:
    (first, second, *_) = parameters(0)
    stream = LayerStream({0: [first, second, first]}, CPU)
    assert stream.host_bytes == first.nbytes + second.nbytes


def mapped(tensor: Tensor, file: Path) -> Tensor:
    """The same values, in memory that is mapped from `file`."""
    file.write_bytes(bytes(tensor.reshape(-1).view(torch.uint8).tolist()))
    return torch.from_file(str(file), shared=False, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)


def test_layers_on_disk_stay_mapped_beside_others(tmp_path: Path) -> None:
    layers, expected = layers_of(0, 1, 2)
    for number, parameter in enumerate(layers[1]):
        if parameter.numel():
            parameter.data = mapped(parameter.detach(), tmp_path / str(number))
    places = [parameter.data_ptr() for parameter in layers[1]]
    stream = LayerStream(layers, CPU, slots=1, on_disk=[1])
    assert [parameter.data_ptr() for parameter in layers[1]] == places
    for index in [0, 1, 2, 1, 0, 1]:
        stream.ready(index)
        assert in_slots(stream, layers[index])
        assert same(layers[index], expected[index])
    stream.ready(0)
    assert [parameter.data_ptr() for parameter in layers[1]] == places


def test_graphs_can_hold_copies_from_the_host_alone() -> None:
    assert LayerStream({0: parameters(0)}, CPU).capturable
    assert not LayerStream({0: parameters(0), 1: parameters(1)}, CPU, on_disk=[1]).capturable


def test_large_layers_are_read_from_disk_in_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.memory.transfer._SEGMENT_BYTES", 100)
    layers, expected = layers_of(0, 1, 2)
    stream = stream_of(layers, "disk", 2)
    for index in training_pass(range(3)):
        stream.ready(index)
        assert same(layers[index], expected[index])


def test_rewinding_brings_the_first_layers_back(place: str) -> None:
    layers, expected = layers_of(*range(6))
    stream = stream_of(layers, place, 2)
    for index in range(6):
        stream.ready(index)
    assert sorted(stream.on_device) == [4, 5]
    stream.rewind()
    assert stream.on_device == [0, 1]
    for index in training_pass(range(6)):
        stream.ready(index)
        assert same(layers[index], expected[index])


def test_settled_layers_can_be_read_without_more_ado(place: str) -> None:
    layers, expected = layers_of(*range(6))
    stream = stream_of(layers, place, 3)
    for index in range(6):
        stream.ready(index)
    stream.settle()
    for index in range(3):
        assert in_slots(stream, layers[index])
        assert same(layers[index], expected[index])


@dataclass
class LateSide:
    """A side stream whose copies are done when someone waits for them, and not before."""

    device: torch.device
    begun: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    done: int = 0

    def wait_for_current(self) -> None: ...

    def copy(self, target: Tensor, source: Tensor) -> LateCopy:
        self.begun.append((target, source))
        return LateCopy(self, len(self.begun))


@dataclass
class LateCopy:
    side: LateSide
    count: int

    def join(self) -> None:
        for target, source in self.side.begun[self.side.done : self.count]:
            target.copy_(source)
        self.side.done = max(self.side.done, self.count)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_copies_are_waited_for(monkeypatch: pytest.MonkeyPatch, slots: int) -> None:
    monkeypatch.setattr("nybble.memory.stream.SideStream", LateSide)
    layers, expected = layers_of(*range(6))
    stream = stream_of(layers, "host", slots)
    jumps = torch.randint(0, 6, (40,)).tolist()
    for index in [*training_pass(range(6)) * 2, *jumps]:
        stream.ready(index)
        assert same(layers[index], expected[index])
    stream.settle()
    assert same(layers[0], expected[0])


def test_what_is_trained_is_not_streamed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        LayerStream({0: [nn.Parameter(torch.ones(3))]}, CPU)


def test_a_stream_needs_a_slot() -> None:
    with pytest.raises(ValueError, match="slot"):
        LayerStream({0: parameters(0)}, CPU, slots=0)
