"""One step: the same update by either kind of optimizer, and none at all where loss or gradients are not finite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from nybble.config import RunConfig
from nybble.data.collate import Batch
from nybble.errors import TrainingStopped
from nybble.train.loop import training_steps
from nybble.train.step import EagerStep
from tests.train.toy import Toy, batch, eager_step, optimizer_of, run, state_of, window


class Spoilt(Toy):
    """A Toy whose loss is not finite; its gradients are."""

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> Tensor:
        return super().forward(input_ids, labels, position_ids) + torch.inf


def config(**changes: object) -> RunConfig:
    needed = {"model.name": "m", "data.path": "d", "output": "o"}
    return RunConfig.read(None, needed | {name.replace("__", "."): value for name, value in changes.items()})


def test_both_kinds_of_optimizer_do_the_same_steps() -> None:
    """AdamW over flat buffers updates at once, PyTorch's after the host has read the figures."""
    ours, theirs = Toy().double(), Toy().double()
    settings = {"weight_decay": 0.1, "lr": 1e-2}
    groups = [{"params": [theirs.up, theirs.down]}, {"params": [theirs.bias], "weight_decay": 0.0}]
    flat = EagerStep(ours, optimizer_of(ours), max_grad_norm=0.1)
    plain = EagerStep(theirs, torch.optim.AdamW(groups, **settings), max_grad_norm=0.1)
    assert (flat.updates_at_once, plain.updates_at_once) == (True, False)
    windows = [window([(2, 12), (1, 7)], seed) for seed in range(6)]
    for a, b in zip(run(flat, windows)[0], run(plain, windows)[0], strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-12)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-12)
        assert a.grad_norm > 0.1
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_nothing_is_updated_if_the_loss_is_not_finite() -> None:
    executor = eager_step(Spoilt())
    before = state_of(executor)
    assert executor.launch(window([(2, 8)], 0), seed=0) is None
    figures = executor.read()
    assert figures.loss == torch.inf
    assert 0 < figures.grad_norm < torch.inf
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(executor), strict=True))


def test_nothing_is_updated_if_a_gradient_is_not_finite() -> None:
    toy = Toy()
    toy.bias.register_hook(lambda gradient: gradient * torch.nan)
    steps = training_steps(toy, [batch((2, 8), 0)], optimizer_of(toy), config(), total_steps=1)
    before = [parameter.detach().clone() for parameter in toy.parameters()]
    with pytest.raises(TrainingStopped, match="step 1: the gradient norm is nan"):
        next(steps)
    assert all(torch.equal(a, b) for a, b in zip(before, toy.parameters(), strict=True))


def test_micro_batches_are_taken_one_step_ahead_and_no_further() -> None:
    """While the device works on one step, the host prepares the next; resuming needs no more than to drop it."""
    taken: list[int] = []

    def micro_batches() -> Iterator[Batch]:
        for number in range(100):
            taken.append(number)
            yield batch((1, 8), number)

    toy = Toy()
    settings = config(train__gradient_accumulation=2)
    steps = training_steps(toy, micro_batches(), optimizer_of(toy), settings, total_steps=3)
    counts = [len(taken) for _ in steps]
    assert counts == [4, 6, 6]


def test_a_resumed_run_draws_what_it_would_have_drawn() -> None:
    """The rate is next to nothing and the batch always the same, so only dropout tells steps apart."""
    toy, settings = Toy(dropout=0.5), config(optim__learning_rate=1e-30)

    def losses(first_step: int) -> list[float]:
        batches = [batch((1, 8), 0)] * (6 - first_step)
        steps = training_steps(toy, batches, optimizer_of(toy), settings, total_steps=6, first_step=first_step)
        return [result.loss for result in steps]

    straight = losses(0)
    assert losses(4) == straight[4:]
    assert len(set(straight)) == 6
