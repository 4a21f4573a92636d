"""The benchmarks of loading and merging, on a tiny shape: what they write can be read, and they see what is held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def layers() -> Any:
    import layer_checkpoint

    return layer_checkpoint


def test_host_memory_is_seen_while_it_is_held() -> None:
    from host_peak import host_peak

    with host_peak() as measured:
        torch.ones(2**27, dtype=torch.uint8)
    assert 2**26 < measured.peak_bytes < 2**28


def test_a_checkpoint_is_loaded(layers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from load_memory import measure

    monkeypatch.setattr(layers, "_BLOCK_VALUES", 1000)  # tensors of several blocks
    layers.write_checkpoint("tiny-2layers", tmp_path / "tiny")
    figures = measure(tmp_path / "tiny", "nf4")
    assert figures["result_bytes"] > 0
    assert figures["host_peak_beyond_bytes"] < 2**28


@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_an_adapter_is_merged_and_each_file_hashed(layers: Any, tmp_path: Path, base: str) -> None:
    from merge_memory import measure

    layers.write_checkpoint("tiny-2layers", tmp_path / "tiny")
    layers.write_adapter("tiny-2layers", tmp_path / "adapter", r=4)
    figures = measure(tmp_path / "tiny", tmp_path / "adapter", base)
    assert figures["tensors_changed"] == 2 * 7
    assert len(figures["sha256"]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "tiny"]
