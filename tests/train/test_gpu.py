"""The same runs on a GPU: they learn, in fp16 too, and with train.deterministic they repeat and resume to the bit.

Steps as CUDA graphs give the bits of eager steps, and whatever keeps them from being recorded leaves those.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nybble.config import RunConfig
from nybble.errors import TrainingStopped
from nybble.train.graph import GraphStep, NotRecorded, Recorder
from nybble.train.loop import training_steps
from nybble.train.out_of_memory import explain_out_of_memory
from nybble.train.run import run_training
from nybble.train.step import EagerStep
from tests.train.test_state import HARD, assert_same, cut_off
from tests.train.toy import Toy, batch, eager_step, optimizer_of, run, state_of, window

pytestmark = pytest.mark.gpu

LONG, SHORT, OTHER = [(2, 24), (1, 17)], [(1, 9)], [(2, 8)]


class Counting(Recorder):
    """Counts what is recorded and replayed, over all its instances."""

    recorded = replayed = 0

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        replay = super().record(function)
        Counting.recorded += 1

        def counted() -> None:
            Counting.replayed += 1
            replay()

        return counted


@pytest.fixture(autouse=True)
def _count_anew() -> None:
    Counting.recorded = Counting.replayed = 0


def graph_step(before: Callable[[Toy], None] | None = None, lr: float = 1e-2) -> GraphStep:
    toy = Toy(before=before).cuda()
    eager = EagerStep(toy, optimizer_of(toy, lr), max_grad_norm=1.0)
    return GraphStep(eager, Counting(eager.device))


def assert_as_eager(graph: GraphStep, shapes: list[list[tuple[int, int]]]) -> list[str]:
    """The same bits after windows of these shapes as eager steps have; returns the notes."""
    windows = [window(each, seed, pinned=True) for seed, each in enumerate(shapes)]
    eager = eager_step(Toy().cuda())
    theirs, _ = run(eager, windows)
    ours, notes = run(graph, windows)
    assert ours == theirs
    assert all(torch.equal(a, b) for a, b in zip(state_of(graph.eager), state_of(eager), strict=True))
    return notes


@pytest.mark.usefixtures("own_allocator")
@pytest.mark.parametrize("method", ["qlora", "full"])
def test_resumed_equals_uninterrupted(settings: Callable[..., RunConfig], tmp_path: Path, method: str) -> None:
    changes = HARD | {"method": method, "train.deterministic": True, "lora.use_dora": False}
    often = {"train.save_every": 3, "train.eval_every": 2, "train.keep_checkpoints": 9}
    straight = run_training(settings("qwen2", **changes, **often), quiet=True)
    cut_off(straight.output, tmp_path / "cut", 3)
    resumed = run_training(settings("qwen2", **changes, **often, output=str(tmp_path / "cut")), resume=True, quiet=True)
    assert_same(straight, resumed)
    assert straight.summary["device"]["type"] == "cuda"
    assert straight.summary["peak_device_bytes"] < 2**30


@pytest.mark.parametrize("compute", ["bf16", "fp16", "fp32"])
def test_loss_falls(settings: Callable[..., RunConfig], compute: str) -> None:
    config = settings(**{"model.compute": compute, "method": "qlora", "train.max_steps": 20, "train.batch_size": 4})
    result = run_training(config, quiet=True)
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert result.summary["skipped_steps"] < 10
    assert result.summary["compute"] == compute


def test_out_of_memory_is_explained(settings: Callable[..., RunConfig]) -> None:
    device = torch.device("cuda", 0)
    explained = pytest.raises(TrainingStopped, match=r"out of memory on cuda \(.* GiB in all")
    with explained, explain_out_of_memory(settings(), device):
        torch.empty(2**50, dtype=torch.uint8, device=device)


def test_a_graph_gives_the_bits_of_eager_steps() -> None:
    """With dropout, accumulation, clipping and weight decay; windows of other shapes run in between."""
    shapes = [LONG, LONG, SHORT, LONG, LONG, SHORT, SHORT, LONG, OTHER, OTHER, OTHER, SHORT]
    assert assert_as_eager(graph_step(), shapes) == []
    assert (Counting.recorded, Counting.replayed) == (2, 5)


def test_a_graph_draws_by_the_seed_of_the_step() -> None:
    graph, taken = graph_step(lr=0.0), window(LONG, 0, pinned=True)
    losses = []
    for seed in (1, 2, 3, 4, 3, 1):  # the first two are eager
        graph.launch(taken, seed)
        losses.append(graph.read().loss)
    assert Counting.replayed == 4
    assert losses[4:] == [losses[2], losses[0]]
    assert len(set(losses)) == 4


def test_the_loop_runs_graphs_where_it_may(settings: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.train.loop.Recorder", Counting)
    losses = {}
    for graphs in (True, False):
        toy = Toy().cuda()
        config = settings(**{"train.cuda_graph": graphs, "train.gradient_accumulation": 2})
        batches = [batch((2, 16), number) for number in range(16)]
        steps = training_steps(toy, batches, optimizer_of(toy), config, total_steps=8)
        losses[graphs] = [(result.loss, result.grad_norm, result.note) for result in steps]
        assert Counting.replayed == 6
    assert losses[True] == losses[False]


def test_a_graph_updates_nothing_where_the_loss_is_not_finite(
    settings: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nybble.train.loop.Recorder", Counting)
    toy = Toy().cuda()
    optimizer = optimizer_of(toy)
    steps = training_steps(toy, [batch((2, 16), 0)] * 8, optimizer, settings(), total_steps=8)
    for _ in range(5):
        next(steps)
    with torch.no_grad():
        toy.bias[3] = torch.nan
    before = toy.down.detach().clone()
    with pytest.raises(TrainingStopped, match="step 6: the loss is nan"):
        next(steps)
    assert Counting.replayed == 4
    assert torch.equal(toy.down, before)
    assert optimizer.step_count.item() == 5


def test_a_module_that_waits_runs_eagerly() -> None:
    def ask(toy: Toy) -> None:
        toy.bias.detach().sum().item()

    (note,) = assert_as_eager(graph_step(ask), [LONG] * 6)
    assert "synchronizing" in note
    assert Counting.recorded == 0


def test_a_recording_that_cuda_breaks_off_leaves_eager_steps() -> None:
    def wait(_: Toy) -> None:
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()

    (note,) = assert_as_eager(graph_step(wait), [LONG] * 6)
    assert "captur" in note
    assert Counting.recorded == 0
    torch.cuda.empty_cache()
    assert assert_as_eager(graph_step(), [LONG] * 6) == []
    assert Counting.replayed == 4


def test_a_recording_without_the_memory_leaves_eager_steps() -> None:
    def allocate(_: Toy) -> None:
        if torch.cuda.is_current_stream_capturing():
            torch.empty(2**45, dtype=torch.uint8, device="cuda")

    (note,) = assert_as_eager(graph_step(allocate), [LONG] * 6)
    assert "out of memory" in note
    assert Counting.recorded == 0


@pytest.mark.usefixtures("own_allocator")
def test_a_recording_that_cuda_breaks_off_leaves_no_memory() -> None:
    def wait() -> None:
        torch.empty(2**29, dtype=torch.uint8, device="cuda").zero_()
        torch.cuda.synchronize()

    recorder = Recorder(torch.device("cuda", 0))
    before = torch.cuda.memory_reserved()
    with recorder.on_stream(), pytest.raises(NotRecorded):
        recorder.record(wait)
    recorder.forget()
    assert torch.cuda.memory_reserved() < before + 2**29


@pytest.mark.usefixtures("own_allocator")
def test_graphs_that_are_forgotten_give_their_memory_back() -> None:
    def allocate() -> None:
        torch.empty(2**29, dtype=torch.uint8, device="cuda").zero_()

    recorder = Recorder(torch.device("cuda", 0))
    before = torch.cuda.memory_reserved()
    with recorder.on_stream():
        replay = recorder.record(allocate)
        replay()
    torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() >= before + 2**29
    recorder.forget()
    assert torch.cuda.memory_reserved() < before + 2**29
    with recorder.on_stream():
        recorder.record(allocate)()
    torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() >= before + 2**29
    recorder.forget()
    assert torch.cuda.memory_reserved() < before + 2**29


@pytest.mark.parametrize("activations", ["keep", "recompute", "offload"])
def test_runs_with_graphs_give_the_bits_of_runs_without(
    settings: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activations: str
) -> None:
    """14 packed rows, 4 a step: the last step of each epoch has 2, and becomes the second graph in the third epoch."""
    monkeypatch.setattr("nybble.train.loop.Recorder", Counting)
    changes = {"data.packing": True, "data.validation_fraction": 0.2, "train.eval_every": 5, "train.max_steps": 16}
    changes |= {
        "method": "qlora",
        "memory.activations": activations,
        "train.deterministic": True,
        "train.batch_size": 4,
    }
    eager, graphs = (
        run_training(settings(**changes, **{"train.cuda_graph": on, "output": str(tmp_path / str(on))}), quiet=True)
        for on in (False, True)
    )
    assert_same(eager, graphs)
    assert (Counting.recorded, Counting.replayed) == (2, 12)
