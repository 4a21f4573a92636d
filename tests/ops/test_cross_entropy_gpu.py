"""The cross-entropy kernel on a card, against float64, beside PyTorch in fp32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nybble.labels import IGNORED
from nybble.ops.cross_entropy import cross_entropy_
from tests.ops.test_cross_entropy import SOFTCAPS, by_autograd, random_rows, rms_error

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that an op allocates is full of NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("vocabulary", [5, 1000, 40001, 49152, 128256, 262144])
@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_is_that_of_pytorch(vocabulary: int, softcap: float | None, dtype: torch.dtype) -> None:
    logits, targets = random_rows(1000 if vocabulary <= 1000 else 64, vocabulary, dtype)
    exact = by_autograd(logits.double(), targets, 0.7, softcap)
    losses, gradient = by_autograd(logits.float(), targets, 0.7, softcap)
    theirs = losses, gradient.to(dtype)
    logits = logits.cuda()
    found = cross_entropy_(logits, targets.cuda(), 0.7, softcap), logits
    for i in range(2):
        assert rms_error(found[i].cpu(), exact[i]) <= 2 * rms_error(theirs[i], exact[i])


def test_same_bits_twice() -> None:
    logits, targets = (tensor.cuda() for tensor in random_rows(300, 49152, torch.bfloat16))
    again = logits.clone()
    assert torch.equal(cross_entropy_(logits, targets, 1.0, None), cross_entropy_(again, targets, 1.0, None))
    assert torch.equal(logits, again)


def test_ignored_and_empty() -> None:
    logits = torch.full((2, 49152), torch.nan, device="cuda")
    targets = torch.full((2,), IGNORED, device="cuda")
    assert cross_entropy_(logits, targets, 1.0, None).tolist() == [0, 0]
    assert torch.equal(logits, torch.zeros_like(logits))
    assert cross_entropy_(logits[:0], targets[:0], 1.0, None).shape == (0,)


def test_more_logits_than_int32_counts() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GB")
    rows = 2**31 // 128256 + 2
    logits = torch.zeros(rows, 128256, dtype=torch.bfloat16, device="cuda")
    targets = torch.full((rows,), IGNORED, device="cuda")
    targets[-1] = 7
    losses = cross_entropy_(logits, targets, 1.0, None)
    torch.testing.assert_close(losses[-1].exp().item(), 128256.0, rtol=1e-5, atol=0)
    assert logits[-1, 7] == -1
    assert not logits[:-1].any()


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_op_is_well_formed() -> None:
    logits, targets = random_rows(6, 9, torch.float32)
    torch.library.opcheck(cross_entropy_, (logits.cuda(), targets.cuda(), 0.7, None))
