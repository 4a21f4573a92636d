"""Cross-entropy in place: its losses and gradients against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from nybble.labels import IGNORED
from nybble.ops.cross_entropy import cross_entropy_

SOFTCAPS = [None, 3.0]


def by_autograd(logits: Tensor, targets: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Losses and the gradient of their sum, as PyTorch computes them in the dtype of the logits."""
    x = logits.clone().requires_grad_()
    z = x * scale if softcap is None else softcap * torch.tanh(x * scale / softcap)
    losses = cross_entropy(z, targets, reduction="none")
    losses.sum().backward()
    return losses.detach(), x.grad


def rms_error(found: Tensor, exact: Tensor) -> float:
    return (found.double() - exact).square().mean().sqrt().item()


def random_rows(rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits of which the targets' are often the largest, and every fifth target ignored."""
    logits, targets = 3 * torch.randn(rows, vocabulary), torch.randint(vocabulary, (rows,))
    logits[torch.arange(0, rows, 2), targets[::2]] += 9
    targets[1::5] = IGNORED
    return logits.to(dtype), targets


@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_float64_equals_autograd(softcap: float | None) -> None:
    logits, targets = random_rows(40, 77, torch.float64)
    losses, gradient = by_autograd(logits, targets, 0.7, softcap)
    torch.testing.assert_close(cross_entropy_(logits, targets, 0.7, softcap), losses)
    torch.testing.assert_close(logits, gradient)


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_is_that_of_pytorch(dtype: torch.dtype, softcap: float | None) -> None:
    logits, targets = random_rows(60, 333, dtype)
    exact = by_autograd(logits.double(), targets, 0.7, softcap)
    losses, gradient = by_autograd(logits.float(), targets, 0.7, softcap)
    theirs = losses, gradient.to(dtype)
    found = cross_entropy_(logits, targets, 0.7, softcap), logits
    assert found[0].dtype == torch.float32
    for i in range(2):
        assert rms_error(found[i], exact[i]) <= 2 * rms_error(theirs[i], exact[i])


def test_ignored_rows_count_for_nothing() -> None:
    logits = torch.full((3, 5), torch.nan)
    logits[1] = 0
    losses = cross_entropy_(logits, torch.tensor([IGNORED, 2, IGNORED]), 1.0, None)
    torch.testing.assert_close(losses, torch.tensor([1.0, 5.0, 1.0]).log())
    assert torch.equal(logits[[0, 2]], torch.zeros(2, 5))
    torch.testing.assert_close(logits[1], torch.tensor([0.2, 0.2, -0.8, 0.2, 0.2]))


def test_no_rows() -> None:
    assert cross_entropy_(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), 1.0, None).shape == (0,)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_op_is_well_formed(softcap: float | None) -> None:
    torch.library.opcheck(cross_entropy_, (*random_rows(6, 9, torch.float32), 0.7, softcap))
