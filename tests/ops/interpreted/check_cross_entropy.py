"""The cross-entropy kernel against its reference. bf16 is left to the GPU: the interpreter truncates casts to it."""

from __future__ import annotations

import pytest
import torch

from nybble.labels import IGNORED
from nybble.ops.cross_entropy import cross_entropy_
from nybble.ops.triton import cross_entropy as kernels
from tests.ops.test_cross_entropy import SOFTCAPS, random_rows, rms_error

# The interpreter computes both sides of a choice: the tanh that is not taken may overflow.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in:RuntimeWarning")


# Less than a vector, less than a block, several blocks and an odd number.
@pytest.mark.parametrize(("rows", "vocabulary"), [(80, 5), (40, 1000), (16, 40001)])
@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_agrees(rows: int, vocabulary: int, softcap: float | None, dtype: torch.dtype) -> None:
    logits, targets = random_rows(rows, vocabulary, dtype)
    exact, theirs = logits.double(), logits.clone()
    exact_losses, their_losses = (cross_entropy_(x, targets, 0.7, softcap) for x in (exact, theirs))
    losses = kernels.cross_entropy_(logits, targets, 0.7, softcap)
    rounding = torch.finfo(torch.float32).eps * exact_losses.abs().max().item()  # of so few losses, theirs may be lucky
    assert rms_error(losses, exact_losses) <= max(2 * rms_error(their_losses, exact_losses), rounding)
    assert rms_error(logits, exact) <= 2 * rms_error(theirs, exact)


def test_ignored_and_empty() -> None:
    logits = torch.full((2, 40001), torch.nan)
    assert kernels.cross_entropy_(logits, torch.full((2,), IGNORED), 1.0, None).tolist() == [0, 0]
    assert torch.equal(logits, torch.zeros_like(logits))
    assert kernels.cross_entropy_(logits[:0], torch.empty(0, dtype=torch.int64), 1.0, None).shape == (0,)


def test_not_a_number_reaches_the_loss() -> None:
    logits = torch.zeros(2, 100)
    logits[1, 5] = torch.nan
    losses = kernels.cross_entropy_(logits, torch.tensor([5, 6]), 1.0, None)
    assert losses.isfinite().tolist() == [True, False]
    assert logits.isfinite().all(1).tolist() == [True, False]
