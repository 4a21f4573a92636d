"""The kernels of the online cross-entropy against their references. bf16 is left to the GPU, as elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nybble.labels import IGNORED
from nybble.ops import online_cross_entropy as ops
from nybble.ops.triton import online_cross_entropy as kernels
from tests.ops.test_cross_entropy import SOFTCAPS, rms_error
from tests.ops.test_online_cross_entropy import at_once, exactly, in_chunks, random_head

# The interpreter computes both sides of a choice: the tanh that is not taken may overflow.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in:RuntimeWarning")

Case = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Tensor, Tensor]]:
    """Losses and gradient as the kernels compute them, with memory that they must write full of NaN."""
    poisoned = torch.full_like
    monkeypatch.setattr(ops, "online_cross_entropy_", kernels.online_cross_entropy_)
    monkeypatch.setattr(ops, "online_cross_entropy_end", kernels.online_cross_entropy_end)
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **kwargs: poisoned(tensor, torch.nan, **kwargs))
    return in_chunks


# Less than a vector; hidden states of more than a block of 2,048; more words than a block of 16,384.
@pytest.mark.parametrize(
    ("rows", "vocabulary", "columns", "hidden"),
    [(40, 5, 5, 8), (16, 1000, 600, 24), (8, 300, 300, 2100), (10, 16501, 16450, 40)],
)
@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_agrees(
    by_kernels: Callable[..., tuple[Tensor, Tensor]],
    rows: int,
    vocabulary: int,
    columns: int,
    hidden: int,
    softcap: float | None,
    dtype: torch.dtype,
) -> None:
    case = random_head(rows, vocabulary, hidden, dtype)
    exact, theirs = exactly(*case, softcap), at_once(*case, softcap)
    found = by_kernels(*case, columns, softcap)
    rounding = torch.finfo(torch.float32).eps * exact[0].abs().max().item()  # of so few losses, theirs may be lucky
    assert rms_error(found[0], exact[0]) <= max(2 * rms_error(theirs[0], exact[0]), rounding)
    assert rms_error(found[1], exact[1]) <= 2 * rms_error(theirs[1], exact[1])


def test_without_gradient_logits_stay(by_kernels: Callable[..., tuple[Tensor, Tensor]]) -> None:
    x, weight, bias, targets = random_head(10, 77, 24, torch.float32)
    expected, _ = by_kernels(x, weight, bias, targets, 77, None)
    online = ops.OnlineCrossEntropy(x, targets, scale=0.7, softcap=None, with_gradient=False)
    logits = torch.nn.functional.linear(x, weight, bias)
    before = logits.clone()
    kernels.online_cross_entropy_(logits, targets, 0, weight, online.state, None, None, 0.7, None)
    assert torch.equal(logits, before)
    assert torch.equal(online.finish(None), expected)


def test_ignored_and_empty(by_kernels: Callable[..., tuple[Tensor, Tensor]]) -> None:
    x, weight, bias, _ = random_head(3, 40, 24, torch.float32)
    x.fill_(torch.nan)
    losses, d_hidden = by_kernels(x, weight, bias, torch.full((3,), IGNORED), 16, None)
    assert losses.tolist() == [0, 0, 0]
    assert torch.equal(d_hidden, torch.zeros_like(x))
    assert by_kernels(*random_head(0, 40, 24, torch.float32), 16, None)[0].shape == (0,)


def test_not_a_number_reaches_the_loss(by_kernels: Callable[..., tuple[Tensor, Tensor]]) -> None:
    x, weight, bias, targets = random_head(5, 77, 24, torch.float32)
    weight[50] = torch.nan
    losses, d_hidden = by_kernels(x, weight, bias, targets, 32, None)
    counted = targets != IGNORED
    assert losses[counted].isnan().all()
    assert d_hidden[counted].isnan().all()
    assert not d_hidden[~counted].any()
