"""Layers that are streamed to a card: copies beside the compute, in the right order, in CUDA graphs too."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from nybble.memory.stream import LayerStream

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
NUM_LAYERS = 6
SIZE = 1024  # 4 MiB a layer: copies take longer than what reads them, unless they wait


def layers() -> dict[int, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(-3, 4, (SIZE, SIZE), generator=generator).float() for _ in range(NUM_LAYERS)]
    return {index: [nn.Parameter(tensor, requires_grad=False)] for index, tensor in enumerate(drawn)}


class Reader:
    """Reads layers in the order given, and adds up what it saw, each weighted by its turn."""

    def __init__(self, stream: LayerStream, held: dict[int, list[nn.Parameter]]) -> None:
        self.stream, self.held = stream, held
        self.x = torch.ones(SIZE, device=CUDA)
        self.seen = torch.zeros(SIZE, device=CUDA)
        torch.cuda.synchronize()  # tests go on in streams of their own

    def read(self, order: Sequence[int]) -> None:
        for turn, index in enumerate(order, 1):
            self.stream.ready(index)
            torch.cuda._sleep(200_000)  # 0.1 ms: a copy into this slot must wait as long
            self.seen.add_(self.held[index][0] @ self.x, alpha=turn)


def expected(order: Sequence[int]) -> Tensor:
    sums = [held[0].double().sum(1) for held in layers().values()]
    return torch.stack([turn * sums[index] for turn, index in enumerate(order, 1)]).sum(0).float().to(CUDA)


PASS = [*range(NUM_LAYERS), *reversed(range(NUM_LAYERS))]


def stream_over(
    held: dict[int, list[nn.Parameter]], *, slots: int = 2, on_disk: Sequence[int] = (), span: int = 1
) -> LayerStream:
    stream = LayerStream(held, CUDA, slots=slots, span=span, on_disk=on_disk)
    for slot in stream.slots:
        slot.fill_(0xFF)  # NaN
    torch.cuda.synchronize()
    return stream


@pytest.mark.parametrize("on_disk", [(), range(NUM_LAYERS), [1, 2]], ids=["host", "disk", "both"])
@pytest.mark.parametrize("slots", [1, 2, 3, 9])
def test_each_layer_is_whole_when_it_is_read(slots: int, on_disk: Sequence[int]) -> None:
    held = layers()
    reader = Reader(stream_over(held, slots=slots, on_disk=on_disk), held)
    jumps = torch.randint(0, NUM_LAYERS, (40,)).tolist()
    order = [*PASS, *PASS, *range(NUM_LAYERS), *range(NUM_LAYERS), *jumps]
    reader.read(order)
    assert torch.equal(reader.seen, expected(order))


@pytest.mark.usefixtures("own_allocator")
def test_layers_from_the_device_leave_it() -> None:
    held = layers()
    for (parameter,) in held.values():
        parameter.data = parameter.detach().to(CUDA)
    before = torch.cuda.memory_allocated()
    stream = stream_over(held)
    assert all(parameter.device.type == "cpu" for (parameter,) in held.values())
    assert torch.cuda.memory_allocated() == before - sum(p.nbytes for (p,) in held.values()) + stream.device_bytes
    reader = Reader(stream, held)
    reader.read(PASS)
    assert torch.equal(reader.seen, expected(PASS))


def test_who_reads_without_asking_fails() -> None:
    held = layers()
    stream = stream_over(held)
    stream.ready(0)
    with pytest.raises(RuntimeError, match="device"):
        held[1][0] @ torch.ones(SIZE, device=CUDA)


@pytest.mark.parametrize(("slots", "span"), [(1, 1), (2, 1), (3, 1), (2, 2), (9, 1)])
def test_a_graph_holds_the_copies(slots: int, span: int) -> None:
    held = layers()
    stream = stream_over(held, slots=slots, span=span)
    reader = Reader(stream, held)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        reader.read(PASS)
        stream.settle()
    torch.cuda.synchronize()
    replay = recorded(lambda: (reader.read(PASS), stream.settle()), side)
    with torch.cuda.stream(side):
        for _ in range(3):
            reader.seen.zero_()
            replay()
            assert torch.equal(reader.seen, expected(PASS))
            reader.seen.zero_()
            reader.read(range(NUM_LAYERS))  # as an evaluation does
            assert torch.equal(reader.seen, expected(range(NUM_LAYERS)))
            stream.rewind()
            stream.settle()


def recorded(function: Callable[[], object], stream: torch.cuda.Stream) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph.replay


def test_a_recording_that_fails_leaves_what_was_there() -> None:
    held = layers()
    stream = stream_over(held)
    reader = Reader(stream, held)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        reader.read(PASS)
        stream.settle()
    torch.cuda.synchronize()

    def break_off() -> None:
        reader.read([0, 1, 2, 3])
        stream.ready(2)
        stream.settle()  # nothing is left under way, so that the recording itself can end
        raise InterruptedError

    with pytest.raises(InterruptedError):
        recorded(break_off, side)
    with torch.cuda.stream(side):
        reader.seen.zero_()
        reader.read(PASS)
        assert torch.equal(reader.seen, expected(PASS))


def test_a_recording_begins_at_the_first_layers() -> None:
    held = layers()
    stream = stream_over(held)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        stream.ready(4)
        stream.ready(5)
    torch.cuda.synchronize()
    counter = torch.zeros(1, device=CUDA)
    with pytest.raises(RuntimeError, match="first layers"):
        recorded(lambda: (counter.add_(1), stream.ready(0)), side)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_copies_do_not_make_the_host_wait() -> None:
    held = layers()
    stream = stream_over(held)
    reader = Reader(stream, held)
    reader.read(PASS)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        reader.read(PASS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
