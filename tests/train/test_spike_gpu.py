"""One long sequence among short ones, on a card whose memory is bounded: fails unpaged, finishes paged, same losses."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from nybble.config import RunConfig
from nybble.errors import TrainingStopped
from nybble.optim.flat import FlatAdamW
from nybble.train.loop import StepResult, step_executor, training_steps
from tests.train.toy import VOCABULARY, batch

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("own_allocator")]

DEVICE = torch.device("cuda", 0)
WIDTH, INNER = 1024, 49152  # 48 Mi values: 192 MiB of parameters, as much of gradients, 384 MiB of moments
SHORT, LONG = (1, 64), (1, 1344)  # 12 and 252 MiB an activation
# A long step holds 1785 MiB. Without moments it holds 384 less, and the allocator has to reserve 76 more than it holds:
# a gradient of 192 MiB takes the place of the first activation, and nothing fits into what is left there.
LACKING = 128 * 2**20


class Wide(nn.Module):
    """One matrix, tanh, and the same matrix back: the memory of activations grows with the tokens."""

    capturable = True

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator(DEVICE).manual_seed(0)
        self.register_buffer("embedding", torch.randn(VOCABULARY, WIDTH, generator=generator, device=DEVICE))
        self.matrix = nn.Parameter(0.02 * torch.randn(WIDTH, INNER, generator=generator, device=DEVICE))

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> Tensor:
        hidden = self.embedding[input_ids] + 0.01 * position_ids.unsqueeze(-1)
        predicted = (hidden @ self.matrix).tanh() @ self.matrix.T
        return (predicted / INNER - self.embedding[labels]).square().sum() / WIDTH


def free_all() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def results(
    config: RunConfig, moments: Literal["resident", "paged"], shapes: list[tuple[int, int]]
) -> tuple[list[StepResult], list[bool]]:
    """Of each step, and whether the moments were on the device after it."""
    module = Wide()
    optimizer = FlatAdamW(module.parameters(), lr=1e-3, moments=moments)
    batches = [batch(shape, number) for number, shape in enumerate(shapes)]
    executor = step_executor(module, optimizer, config)
    steps = training_steps(module, batches, optimizer, config, total_steps=len(shapes), executor=executor)
    done, places = [], []
    for result in steps:
        done.append(result)
        places.append(optimizer.flats[0].moments["exp_avg"].device == DEVICE)
    return done, places


@pytest.mark.parametrize("graphs", [False, True])
def test_a_spike_that_fails_unpaged_finishes_paged(settings: Callable[..., RunConfig], graphs: bool) -> None:
    config = settings(**{"train.cuda_graph": graphs, "train.gradient_accumulation": 1})
    shapes = [SHORT] * 30 + [LONG] + [SHORT] * 5 + [LONG] + [SHORT] * 5
    free_all()
    enough, _ = results(config, "resident", shapes)
    peak = torch.cuda.max_memory_allocated()

    free_all()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((peak - LACKING) / total)
    with pytest.raises(TrainingStopped, match="out of memory on cuda"):
        results(config, "resident", shapes)
    free_all()
    paged, places = results(config, "paged", shapes)
    assert [(a.loss, a.grad_norm) for a in paged] == [(a.loss, a.grad_norm) for a in enough]
    assert places == [shape == SHORT for shape in shapes]
    notes = [result.note for result in paged if result.note]
    assert any("moments in host memory" in note for note in notes)
    assert len(notes) <= 2
