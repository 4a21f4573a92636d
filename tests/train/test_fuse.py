"""A run's plan is carried out by fused kernels where they are known, else by stock modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nybble.config import RunConfig
from nybble.data.example import Example
from nybble.data.prepare import PreparedData
from nybble.errors import UserError
from nybble.memory.host_matrix import HostEmbedding, HostLinear
from nybble.models.load import load_model
from nybble.models.loss import CausalLMLoss
from nybble.plan import LayerPolicy, MemoryPlan
from nybble.planner.cards import card
from nybble.train.fuse import check_precision, make_loss, rows_of
from nybble.train.plan import Rows, RunPlan
from nybble.train.trainable import make_trainable
from tests.tiny import VOCAB_SIZE

CPU = torch.device("cpu")


def config_of(folder: Path, **overrides: object) -> RunConfig:
    base = {"model.name": str(folder), "data.path": "none", "output": "none", "method": "qlora"}
    return RunConfig.read(None, base | overrides)


def example(*lengths: int, padding: int = 0) -> Example:
    tokens = sum(lengths) + padding
    return Example(torch.zeros(tokens, dtype=torch.int32), torch.ones(tokens, dtype=torch.bool), lengths, row=0)


def data_of(train: list[Example], validation: list[Example]) -> PreparedData:
    return PreparedData(train, validation, None, None, None)  # type: ignore[arg-type]


def loss_of(folder: Path, plan: MemoryPlan, stock: str | None, **overrides: object) -> tuple[CausalLMLoss, list[str]]:
    config = config_of(folder, **overrides)
    loaded = load_model(config.model, device=CPU, storage="nf4", plan=plan)
    make_trainable(loaded, config)
    return make_loss(loaded, config, RunPlan(plan, card("h100"), stock), samples_a_row=1)


def result(loss: CausalLMLoss) -> list[Tensor]:
    ids = torch.randint(3, VOCAB_SIZE, (2, 21), generator=torch.Generator().manual_seed(0))
    value = loss.train()(ids, ids, torch.arange(21).expand(2, 21).contiguous())
    value.backward()
    return [value.detach(), *(p.grad for p in loss.parameters() if p.grad is not None)]


PLANS = {
    "keep": MemoryPlan.uniform(2),
    "recompute": MemoryPlan.uniform(2, "recompute"),
    "streamed": MemoryPlan.uniform(2, "recompute", "streamed"),
    "mixed": MemoryPlan((LayerPolicy("keep_matmuls"), LayerPolicy("offload", "streamed"))),
    "MLP by rows": dataclasses.replace(MemoryPlan.uniform(2, "recompute"), mlp_rows=8),
    "ends on the host": dataclasses.replace(MemoryPlan.uniform(2), embedding="host", head="host"),
}


@pytest.mark.parametrize("stock", [None, "they need a GPU"])
def test_plans_differ_in_no_bit(tiny: Callable[..., Path], stock: str | None) -> None:
    """But for those that multiply other numbers of rows at a time: a head in host memory, an MLP by rows."""
    expected = result(loss_of(tiny("llama"), PLANS["keep"], stock)[0])
    for name, plan in PLANS.items():
        loss, lines = loss_of(tiny("llama"), plan, stock)
        assert (type(loss) is CausalLMLoss) == bool(stock)
        assert lines == [] or not stock
        found = result(loss)
        assert len(found) == len(expected) > 1
        if name in ("ends on the host", "MLP by rows"):
            torch.testing.assert_close(found, expected)
        else:
            assert all(map(torch.equal, found, expected)), name
        model = loss.model
        ends = isinstance(model.get_input_embeddings(), HostEmbedding), isinstance(model.lm_head, HostLinear)
        assert ends == (name == "ends on the host",) * 2


def test_stock_modules_recompute_if_any_layer_does(tiny: Callable[..., Path]) -> None:
    for name, recomputes in {"keep": False, "recompute": True, "mixed": True}.items():
        loss, _ = loss_of(tiny("llama"), PLANS[name], "they need a GPU")
        assert loss.model.is_activation_checkpointing == recomputes


def test_what_is_found_out_after_loading_keeps_the_run_from_fused_regions(tiny: Callable[..., Path]) -> None:
    norms = {"lora.modules_to_save": ["norm"]}
    loss, _ = loss_of(tiny("llama"), PLANS["keep"], None, **norms)
    assert type(loss) is CausalLMLoss
    with pytest.raises(UserError, match=r"memory\.mlp_rows=8: needs fused kernels, and norms are trained"):
        loss_of(tiny("llama"), PLANS["keep"], None, **norms, **{"memory.mlp_rows": 8})


def test_rows_with_several_samples_are_counted_with_their_padding() -> None:
    assert rows_of(data_of([example(5), example(7, padding=1)], [])) == Rows(8, 0, 1)
    assert rows_of(data_of([example(5), example(2, 3)], [])) == Rows(5, 0, 3)
    assert rows_of(data_of([example(5)], [example(1, 1, 1)])) == Rows(5, 3, 4)


def test_fp8_is_refused_where_no_gpu_has_it(tiny: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"compute capability 8\.9"):
        check_precision(config_of(tiny("llama"), **{"train.precision": "fp8"}), CPU)
    check_precision(config_of(tiny("llama")), CPU)
