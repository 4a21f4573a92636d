"""Pages on a card: copies that run ahead and behind lose nothing, and memory is given back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble.memory.paging import NUM_BUFFERS, Pages

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
MIB = 2**20


def make(units: int, *, buckets: int) -> tuple[Pages, list[dict[str, Tensor]]]:
    """One set of 256 codes and a scale a unit, with random values, and copies of these on the device."""
    tensors = {
        "codes": torch.empty(units * 256, dtype=torch.uint8, device="meta"),
        "scales": torch.empty(units, dtype=torch.float32, device="meta"),
    }
    pages = Pages([tensors], [units], DEVICE, bucket_bytes=units * 260 // buckets)
    for tensor in tensors.values():
        tensor.copy_(torch.randint(100, tensor.shape))
    return pages, [{name: tensor.to(DEVICE) for name, tensor in tensors.items()}]


def assert_equal(pages: Pages, expected: list[dict[str, Tensor]]) -> None:
    pages.settle()
    for tensors, others in zip(pages.sets, expected, strict=True):
        assert all(torch.equal(tensors[name].to(DEVICE), others[name]) for name in others)


@pytest.mark.parametrize("buckets", [1, 2, NUM_BUFFERS, 17])
def test_work_in_buckets_reaches_everything(buckets: int) -> None:
    pages, expected = make(40_000, buckets=buckets)
    for seed in range(5):
        torch.manual_seed(seed)
        parts = 0
        for part in pages.parts():
            parts += 1
            scratch = torch.full((8 * MIB,), 255, dtype=torch.uint8, device=DEVICE)  # memory that others had
            repeats = int(torch.randint(20, ()))
            units = slice(part.start, part.stop)
            for codes, scales in (
                (part.tensors["codes"], part.tensors["scales"]),
                (expected[0]["codes"].view(-1, 256)[units], expected[0]["scales"][units]),
            ):
                codes.mul_(3).add_(1)
                for _ in range(repeats):
                    scales.mul_(1.25).sub_(0.5)
            del scratch
        assert buckets <= parts <= buckets + 1
    assert_equal(pages, expected)


@pytest.mark.parametrize("parts_done", [0, 5])
def test_a_recording_that_is_broken_off_can_end(parts_done: int) -> None:
    """Also before anything was copied back: the streams of both copies have joined the recording, and it them."""
    pages, expected = make(40_000, buckets=17)

    def break_off() -> None:
        for number, part in enumerate(pages.parts()):
            if number == parts_done:
                raise InterruptedError
            part.tensors["codes"].add_(1)

    with pytest.raises(InterruptedError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        break_off()
    for part in pages.parts():
        part.tensors["codes"].add_(1)
    expected[0]["codes"].add_(1)
    assert_equal(pages, expected)


@pytest.mark.usefixtures("own_allocator")
def test_everything_moves_and_gives_its_memory_back() -> None:
    pages, expected = make(1_000_000, buckets=4)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        assert pages.restore_if_room()
        assert all(tensor.device == DEVICE for tensor in pages.sets[0].values())
        assert torch.cuda.memory_reserved() > before + 200 * MIB
        for tensors in (pages.sets[0], expected[0]):
            tensors["codes"].mul_(3).add_(1)
        assert pages.evict()
        assert torch.cuda.memory_reserved() == before
        assert_equal(pages, expected)


@pytest.mark.usefixtures("own_allocator")
def test_a_bound_on_the_device_is_respected() -> None:
    pages, expected = make(1_000_000, buckets=4)
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 200 * MIB) / total)
    try:
        assert not pages.restore_if_room()
        for part in pages.parts():
            part.tensors["codes"].add_(1)
        expected[0]["codes"].add_(1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_equal(pages, expected)
    assert not pages.restore_if_room(headroom_bytes=total)
    assert pages.restore_if_room()
