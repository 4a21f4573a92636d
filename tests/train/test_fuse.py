"""Which runs take fused kernels, and what is said of those that do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nybble.config import RunConfig
from nybble.data.example import Example
from nybble.data.prepare import PreparedData
from nybble.errors import UserError
from nybble.models.load import load_model
from nybble.models.loss import CausalLMLoss
from nybble.train.fuse import check_precision, make_loss, most_samples_a_row
from nybble.train.trainable import make_trainable

CPU = torch.device("cpu")


def config_of(folder: Path, **overrides: object) -> RunConfig:
    base = {"model.name": str(folder), "data.path": "none", "output": "none", "method": "qlora"}
    return RunConfig.read(None, base | overrides)


def example(*lengths: int, padding: int = 0) -> Example:
    tokens = sum(lengths) + padding
    return Example(torch.zeros(tokens, dtype=torch.int32), torch.ones(tokens, dtype=torch.bool), lengths, row=0)


def data_of(train: list[Example], validation: list[Example]) -> PreparedData:
    return PreparedData(train, validation, None, None, None)  # type: ignore[arg-type]


def test_a_cpu_runs_the_stock_modules(tiny: Callable[..., Path]) -> None:
    config = config_of(tiny("llama"))
    loaded = load_model(config.model, device=CPU, storage="nf4")
    make_trainable(loaded, config)
    loss, lines = make_loss(loaded, config, samples_a_row=1)
    assert type(loss) is CausalLMLoss
    assert lines == []
    assert loaded.model.is_activation_checkpointing


def test_rows_with_several_samples_are_counted_with_their_padding() -> None:
    assert most_samples_a_row(data_of([example(5), example(7, padding=1)], [])) == 1
    assert most_samples_a_row(data_of([example(5), example(2, 3)], [])) == 3
    assert most_samples_a_row(data_of([example(5)], [example(1, 1, 1)])) == 4


def test_fp8_is_refused_where_no_gpu_has_it(tiny: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"compute capability 8\.9"):
        check_precision(config_of(tiny("llama"), **{"train.precision": "fp8"}), CPU)
    check_precision(config_of(tiny("llama")), CPU)
