"""Tensors come through a ring of staging buffers as they are in the files, however late the device copies them."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nybble.errors import UserError
from nybble.export.quantized import quantize_checkpoint
from nybble.models.checkpoint import Checkpoint
from nybble.models.config import ModelConfig
from nybble.models.load import load_model
from nybble.models.staging import StagingRing
from nybble.models.tensorfile import TensorEntry, read_entries
from nybble.quant.format import NF4Spec
from nybble.quant.linear import NF4Linear
from nybble.quant.weight import NF4Weight

Tiny = Callable[..., Path]

CPU = torch.device("cpu")


class LateDevice(StagingRing):
    """A ring whose device copies nothing before someone waits for it."""

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        super().__init__(buffers, CPU)
        self._begun: list[tuple[Tensor, Tensor]] = []
        self._lock = threading.Lock()
        self._done = 0

    def _copy(self, target: Tensor, source: Tensor) -> None:
        self._begun.append((target, source))

    def _after_copies(self) -> Callable[[], None]:
        count = len(self._begun)
        return lambda: self.copy_until(count)

    def copy_until(self, count: int) -> None:
        with self._lock:
            for target, source in self._begun[self._done : count]:
                target.copy_(source)
            self._done = max(self._done, count)

    def copy_all(self) -> None:
        self.copy_until(len(self._begun))


def buffers(count: int, size: int) -> list[Tensor]:
    return [torch.full((size,), 0xAA, dtype=torch.uint8) for _ in range(count)]


def entries_of(folder: Path, tensors: dict[str, Tensor]) -> dict[str, TensorEntry]:
    """The tensors in two files."""
    entries: dict[str, TensorEntry] = {}
    for part in (0, 1):
        file = folder / f"part-{part}.safetensors"
        save_file({name: tensors[name] for name in list(tensors)[part::2]}, file)
        entries |= read_entries(file)
    return entries


def some_tensors(seed: int) -> dict[str, Tensor]:
    """Smaller and larger than a buffer, as large as one, odd, empty and scalar ones, of several dtypes."""
    generator = random.Random(seed)
    shapes = [(0, 4), (), (1,), (1000,), (2000,), (7, 13), (30, 400), (64,), (63,)]
    shapes += [(generator.randrange(1, 3000),) for _ in range(12)]
    generator.shuffle(shapes)
    dtypes = [torch.uint8, torch.bfloat16, torch.float32, torch.bool]
    return {
        f"tensor {index}": torch.randint(0, 256, shape, dtype=torch.uint8).to(generator.choice(dtypes))
        for index, shape in enumerate(shapes)
    }


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("count", "size"), [(1, 1000), (2, 1024), (3, 1000), (4, 4096), (4, 50), (3, 10**6)])
def test_tensors_come_as_they_are(tmp_path: Path, count: int, size: int, late: bool) -> None:
    tensors = some_tensors(seed=count)
    entries = entries_of(tmp_path, tensors)
    ring = LateDevice(buffers(count, size)) if late else StagingRing(buffers(count, size), CPU)
    read = list(ring.read([entries[name] for name in tensors]))
    if isinstance(ring, LateDevice):
        ring.copy_all()
    for found, expected in zip(read, tensors.values(), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_the_other_buffers_fill_while_one_is_used(tmp_path: Path) -> None:
    entries = entries_of(tmp_path, {"a": torch.zeros(64, dtype=torch.uint8), "b": torch.ones(1024, dtype=torch.uint8)})
    ring_buffers = buffers(3, 64)
    tensors = StagingRing(ring_buffers, CPU).read([entries["a"], entries["b"]])
    next(tensors)
    deadline = time.monotonic() + 30
    while not all(bool((buffer == 1).all()) for buffer in ring_buffers[1:]):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert bool((ring_buffers[0] == 0).all())  # what may still be copied is left alone
    tensors.close()


def test_a_file_that_ends_too_early_is_named_and_no_thread_is_left(tmp_path: Path) -> None:
    entries = entries_of(tmp_path, {"a": torch.zeros(5000), "b": torch.zeros(50_000)})
    with entries["b"].file.open("r+b") as file:
        file.truncate(10_000)
    threads = threading.active_count()
    tensors = StagingRing(buffers(3, 1024), CPU).read([entries["a"], entries["b"]])
    assert torch.equal(next(tensors), torch.zeros(5000))
    with pytest.raises(UserError, match=r"part-1\.safetensors: ends before"):
        next(tensors)
    assert threading.active_count() == threads
    tensors = StagingRing(buffers(3, 1024), CPU).read([entries["a"], entries["b"]])
    next(tensors)
    tensors.close()
    assert threading.active_count() == threads


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tensors of the checkpoint below are larger, some are smaller, and it goes round the ring many times."""
    monkeypatch.setattr("nybble.models.staging._BUFFER_BYTES", 2**16)


def sharded(tiny: Tiny) -> Path:
    return tiny("llama", dtype="bfloat16", sharded=True, hidden_size=256, intermediate_size=1024, num_hidden_layers=6)


@pytest.mark.gpu
@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("quantized", [False, True])
def test_a_gpu_gets_the_bits_of_the_files(tiny: Tiny, tmp_path: Path, quantized: bool) -> None:
    folder = sharded(tiny)
    if quantized:
        quantize_checkpoint(Checkpoint.open(str(folder)), tmp_path / "nf4", NF4Spec(), device=CPU)
        folder = tmp_path / "nf4"
    config = ModelConfig(name=str(folder), compute="fp32")
    expected = load_model(config, device=CPU).model.state_dict()
    for _ in range(3):  # the second takes over the pinned memory of the first
        found = load_model(config, device=torch.device("cuda")).model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name].cpu(), tensor) for name, tensor in expected.items())


@pytest.mark.gpu
@pytest.mark.usefixtures("small_buffers")
def test_a_gpu_quantizes_what_has_arrived(tiny: Tiny) -> None:
    config = ModelConfig(name=str(sharded(tiny)), compute="fp32")
    dense = load_model(config, device=CPU).model
    found = load_model(config, device=torch.device("cuda"), storage="nf4").model
    linears = {path: module for path, module in found.named_modules() if isinstance(module, NF4Linear)}
    assert linears
    for path, module in linears.items():
        expected = NF4Weight.quantize(dense.get_submodule(path).weight.cuda(), NF4Spec())
        pairs = zip(module.nf4_weight.tensors, expected.tensors, strict=True)
        assert all(torch.equal(one, other) for one, other in pairs), path
