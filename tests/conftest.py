"""What all tests share: no network, one thread, a cache of their own, and tiny checkpoints made once a session."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# PyTorch reads it at its first product on a GPU; without it, no test after that could ask for deterministic kernels.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from nybble.memory.budget import expand_segments
from tests.tiny import tiny_model

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_numbers_each_time() -> None:
    """A test that passes does so again: bounds that compare two roundings are close to what some inputs give."""
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    """Tests that are not for a GPU run on the CPU, on machines with a GPU too, and in processes that they start."""
    if config.option.markexpr == "not gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def own_allocator() -> Iterator[None]:
    """PyTorch's allocator of a GPU as runs have it, for tests that count its memory or bound it.

    It holds no garbage of tests before, and has no bound for those behind.
    """
    _give_back()
    expand_segments()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    _give_back()


def _give_back() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Neither find nor leave anything in the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny(kind, **options) -> folder`: a checkpoint of `tests.tiny.tiny_model`, made once; do not write to it."""
    made: dict[str, Path] = {}

    def folder_of(kind: str, **options: Any) -> Path:
        name = "-".join([kind, *(f"{key}={options[key]}" for key in sorted(options))])
        if name not in made:
            made[name] = tiny_model(kind, tmp_path_factory.mktemp(kind), **options)
        return made[name]

    return folder_of


@pytest.fixture
def hub(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> dict[str | None, Path]:
    """The revisions of `org/model`, the one model that is on the hub: by default other weights than at v1.0."""
    revisions: dict[str | None, Path] = {None: tiny("smollm", seed=1), "v1.0": tiny("smollm")}

    def fetch(name: str, revision: str | None, **_: bool) -> Path:
        assert name == "org/model"
        return revisions[revision]

    monkeypatch.setattr("nybble.models.checkpoint.fetch", fetch)
    return revisions
