"""The kernels of the online cross-entropy on a card, and their products, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nybble.labels import IGNORED
from nybble.ops.wide import add_product_
from tests.ops.test_cross_entropy import SOFTCAPS, rms_error
from tests.ops.test_online_cross_entropy import LIKENESS, at_once, exactly, in_chunks, random_head

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that an op allocates is full of NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("likeness", LIKENESS)
@pytest.mark.parametrize(("vocabulary", "columns"), [(5, 5), (1000, 300), (40001, 20000), (128256, 9984)])
@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_is_that_of_all_logits_at_once(
    vocabulary: int, columns: int, softcap: float | None, dtype: torch.dtype, likeness: float
) -> None:
    rows = 1000 if vocabulary <= 1000 else 64
    case = tuple(tensor.cuda() for tensor in random_head(rows, vocabulary, 264, dtype, likeness=likeness))
    exact, theirs, found = exactly(*case, softcap), at_once(*case, softcap), in_chunks(*case, columns, softcap)
    assert found[1].dtype == dtype
    rounding = torch.finfo(torch.float32).eps * exact[0].abs().max().item()
    assert rms_error(found[0], exact[0]) <= max(2 * rms_error(theirs[0], exact[0]), rounding)
    assert rms_error(found[1], exact[1]) <= 2 * rms_error(theirs[1], exact[1])


def test_same_bits_twice() -> None:
    case = tuple(tensor.cuda() for tensor in random_head(300, 49152, 256, torch.bfloat16))
    for one, other in zip(in_chunks(*case, 8192, None), in_chunks(*case, 8192, None), strict=True):
        assert torch.equal(one, other)


def test_ignored_and_empty() -> None:
    x, weight, bias, targets = (tensor.cuda() for tensor in random_head(3, 4000, 256, torch.bfloat16))
    x.fill_(torch.nan)
    losses, d_hidden = in_chunks(x, weight, bias, torch.full_like(targets, IGNORED), 1024, None)
    assert losses.tolist() == [0, 0, 0]
    assert torch.equal(d_hidden, torch.zeros_like(x))
    assert in_chunks(x[:0], weight, bias, targets[:0], 1024, None)[0].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_products_are_added_in_fp32(dtype: torch.dtype) -> None:
    """In place, and rounded nowhere to half precision: small products are added to a large total."""
    total = torch.full((256, 128), 1000.0, device="cuda")
    a, b = (torch.randn(256, 512, device="cuda").to(dtype), torch.randn(512, 128, device="cuda").to(dtype) / 1000)
    expected = total.double() + a.double() @ b.double()
    place = total.data_ptr()
    add_product_(total, a, b)
    assert total.data_ptr() == place
    # Sums of 512 products of about 1e-3, and one rounding at 1000: 6e-5.
    torch.testing.assert_close(total.double(), expected, rtol=0, atol=1.3e-4)
