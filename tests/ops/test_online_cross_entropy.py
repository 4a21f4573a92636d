"""Cross-entropy from a head in chunks: losses and gradients of hidden states against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble.labels import IGNORED
from nybble.ops.cross_entropy import cross_entropy_
from nybble.ops.online_cross_entropy import OnlineCrossEntropy, online_cross_entropy_, online_cross_entropy_end
from nybble.ops.wide import add_product_
from tests.ops.test_cross_entropy import SOFTCAPS, by_autograd, rms_error

SCALE = 0.7
# By how much a row's hidden state is that of its target: of no use, as in training, and so much that p is nearly 1.
LIKENESS = [0.0, 0.5, 3.0]


def random_head(
    rows: int, vocabulary: int, hidden: int, dtype: torch.dtype, *, likeness: float = 0.5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, a head whose later words have larger logits, its bias, and targets, every fifth ignored."""
    weight = torch.randn(vocabulary, hidden) / hidden**0.5 * torch.linspace(0.5, 4, vocabulary)[:, None]
    bias = torch.randn(vocabulary)
    targets = torch.randint(vocabulary, (rows,))
    x = torch.randn(rows, hidden) + likeness * weight[targets]
    targets[1::5] = IGNORED
    return x.to(dtype), weight.to(dtype), bias.to(dtype), targets


def in_chunks(
    x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, columns: int, softcap: float | None
) -> tuple[Tensor, Tensor]:
    online = OnlineCrossEntropy(x, targets, scale=SCALE, softcap=softcap, with_gradient=True)
    for first in range(0, len(weight), columns):
        chunk = slice(first, first + columns)
        online.take(first, weight[chunk], bias[chunk])
    d_hidden = torch.full_like(x, torch.nan)
    return online.finish(d_hidden), d_hidden


def at_once(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """As a head on the device is used: all logits of a row in the dtype of x, which become their gradient."""
    logits = torch.nn.functional.linear(x, weight, bias)
    losses = cross_entropy_(logits, targets, SCALE, softcap)
    return losses, logits @ weight


def exactly(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    x, weight, bias = x.double(), weight.double(), bias.double()
    losses, d_logits = by_autograd(torch.nn.functional.linear(x, weight, bias), targets, SCALE, softcap)
    return losses, d_logits @ weight


@pytest.mark.parametrize("columns", [1, 7, 32, 77, 100])
@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_float64_equals_autograd(columns: int, softcap: float | None) -> None:
    case = random_head(40, 77, 24, torch.float64)
    for found, exact in zip(in_chunks(*case, columns, softcap), exactly(*case, softcap), strict=True):
        torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("likeness", LIKENESS)
@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_is_that_of_all_logits_at_once(dtype: torch.dtype, softcap: float | None, likeness: float) -> None:
    case = random_head(100, 1000, 64, dtype, likeness=likeness)
    exact = exactly(*case, softcap)
    theirs = at_once(*case, softcap)
    found = in_chunks(*case, 128, softcap)
    assert found[0].dtype == torch.float32
    assert found[1].dtype == dtype
    for i in range(2):
        assert rms_error(found[i], exact[i]) <= 2 * rms_error(theirs[i], exact[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_gradients_of_a_confident_model(dtype: torch.dtype) -> None:
    """Of p - 1 for the target, p = 0.9999 rounded to bf16 would leave nothing."""
    x, weight, bias, targets = random_head(100, 1000, 64, dtype, likeness=0)
    targets = targets.where(targets == IGNORED, 900 + targets // 10)  # words with large logits
    x += 2.5 * weight[targets.clamp(min=0)]
    exact = exactly(x, weight, bias, targets, None)
    assert 0 < exact[0].mean() < 0.01
    theirs, found = at_once(x, weight, bias, targets, None), in_chunks(x, weight, bias, targets, 128, None)
    assert rms_error(found[1], exact[1]) <= 2 * rms_error(theirs[1], exact[1])


def test_without_gradient() -> None:
    x, weight, bias, targets = random_head(40, 77, 24, torch.float32)
    online = OnlineCrossEntropy(x, targets, scale=SCALE, softcap=None, with_gradient=False)
    for first in range(0, 77, 32):
        online.take(first, weight[first : first + 32], bias[first : first + 32])
    assert torch.equal(online.finish(None), in_chunks(x, weight, bias, targets, 32, None)[0])


def test_ignored_rows_count_for_nothing() -> None:
    x, weight, bias, targets = random_head(40, 77, 24, torch.float32)
    expected = in_chunks(x, weight, bias, targets, 32, None)
    x[targets == IGNORED] = torch.nan
    losses, d_hidden = in_chunks(x, weight, bias, targets, 32, None)
    assert torch.equal(losses, expected[0])
    assert torch.equal(d_hidden, expected[1])
    assert not losses[targets == IGNORED].any()
    assert not d_hidden[targets == IGNORED].any()


def test_not_a_number_reaches_the_loss() -> None:
    x, weight, bias, targets = random_head(5, 77, 24, torch.float32)
    weight[50] = torch.nan
    losses, d_hidden = in_chunks(x, weight, bias, targets, 32, None)
    counted = targets != IGNORED
    assert losses[counted].isnan().all()
    assert d_hidden[counted].isnan().all()
    assert not d_hidden[~counted].any()


def test_no_rows_and_one_word() -> None:
    losses, d_hidden = in_chunks(*random_head(0, 77, 24, torch.float32), 32, None)
    assert losses.shape == (0,)
    assert d_hidden.shape == (0, 24)
    losses, d_hidden = in_chunks(*random_head(4, 1, 24, torch.float32), 1, None)
    assert not losses.any()
    assert not d_hidden.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_are_added_in_fp32(dtype: torch.dtype) -> None:
    total, a, b = torch.randn(5, 4), torch.randn(5, 3).to(dtype), torch.randn(3, 4).to(dtype)
    expected = total + a.float() @ b.float()
    add_product_(total, a, b)
    torch.testing.assert_close(total, expected)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_ops_are_well_formed(softcap: float | None, with_gradient: bool) -> None:
    x, weight, bias, targets = random_head(6, 9, 8, torch.float32)
    online = OnlineCrossEntropy(x, targets, scale=SCALE, softcap=softcap, with_gradient=with_gradient)
    kept = online.gradient, online.target_rows
    if online.target_rows is not None:
        online.target_rows.zero_()
    logits = torch.nn.functional.linear(x, weight, bias)
    torch.library.opcheck(online_cross_entropy_, (logits, targets, 0, weight, online.state, *kept, SCALE, softcap))
    d_hidden = torch.zeros_like(x) if with_gradient else None
    torch.library.opcheck(online_cross_entropy_end, (online.state, targets, *kept, d_hidden, SCALE, softcap))
