"""A loss module small enough to be recorded in an instant, and windows for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from nybble.data.collate import Batch
from nybble.optim.flat import FlatAdamW
from nybble.train.step import EagerStep, Figures, StepExecutor
from nybble.train.window import Window

VOCABULARY, HIDDEN = 50, 64


class Toy(nn.Module):
    """Learns to tell the next token's embedding. Deterministic on a GPU too: nothing but products and sums.

    before: called at the beginning of each forward pass.
    """

    capturable = True

    def __init__(self, dropout: float = 0.3, before: Callable[[Toy], None] | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("embedding", torch.randn(VOCABULARY, HIDDEN, generator=generator))
        self.up = nn.Parameter(0.1 * torch.randn(HIDDEN, HIDDEN, generator=generator))
        self.bias = nn.Parameter(torch.zeros(HIDDEN))
        self.down = nn.Parameter(0.1 * torch.randn(HIDDEN, HIDDEN, generator=generator))
        self.dropout = nn.Dropout(dropout)
        self.before = before

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> Tensor:
        if self.before is not None:
            self.before(self)
        hidden = self.embedding[input_ids] + 0.01 * position_ids.unsqueeze(-1)
        predicted = self.dropout((hidden @ self.up + self.bias).tanh()) @ self.down
        return (predicted - self.embedding[labels]).square().sum() / HIDDEN


def optimizer_of(module: nn.Module, lr: float = 1e-2, moments: Literal["resident", "paged"] = "resident") -> FlatAdamW:
    matrices = [p for p in module.parameters() if p.dim() > 1]
    vectors = [p for p in module.parameters() if p.dim() == 1]
    return FlatAdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors}], lr=lr, moments=moments)


def eager_step(module: nn.Module) -> EagerStep:
    return EagerStep(module, optimizer_of(module), max_grad_norm=1.0)


def batch(shape: tuple[int, int], seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(VOCABULARY, (2, *shape), generator=generator)
    return Batch(ids, labels, torch.arange(shape[1]).expand(shape), labels.numel() - seed % 5)


def window(shapes: Sequence[tuple[int, int]], seed: int, *, pinned: bool = False) -> Window:
    return Window.pack([batch(shape, 10 * seed + index) for index, shape in enumerate(shapes)], pinned=pinned)


def run(executor: StepExecutor, windows: Sequence[Window]) -> tuple[list[Figures], list[str]]:
    """Figures of all steps, and the notes."""
    figures, notes = [], []
    for number, taken in enumerate(windows):
        notes.append(executor.launch(taken, seed=1000 + number))
        figures.append(executor.read())
        executor.finish()
    return figures, [note for note in notes if note]


def state_of(executor: EagerStep) -> list[Tensor]:
    """Copies of all that a step alters: parameters, moments, gradients, and the count of steps."""
    optimizer = executor.optimizer
    assert isinstance(optimizer, FlatAdamW)
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    return [tensor.detach().clone() for tensor in (*optimizer.state, *states, *optimizer.flat_gradients())]
