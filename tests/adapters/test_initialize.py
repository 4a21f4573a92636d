"""Pairs that do not begin at zero: what they hold, and what is left of the weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nybble.adapters.config import LoraConfig
from nybble.adapters.initialize import calibrated, leading_singular, loftq, principal
from nybble.adapters.residual import FoundResidual
from nybble.adapters.start import AdapterStart, Factors
from nybble.errors import UserError
from nybble.quant.correction import Correction
from nybble.quant.format import NF4Spec
from nybble.quant.weight import NF4Weight
from nybble.settings import parse_section

CPU = torch.device("cpu")


def matrix(out: int = 96, inside: int = 64, seed: int = 0) -> Tensor:
    """Singular values that fall, as those of real weights do."""
    generator = torch.Generator().manual_seed(seed)
    U, _, V = torch.linalg.svd(torch.randn(out, inside, generator=generator), full_matrices=False)
    return (U * 0.9 ** torch.arange(min(out, inside))) @ V


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def through_nf4(weight: Tensor) -> Tensor:
    return NF4Weight.quantize(weight, NF4Spec()).dequantize(torch.float32)


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (200, 40)])
def test_leading_singular_values_are_those_of_the_whole_decomposition(shape: tuple[int, int]) -> None:
    weight = matrix(*shape)
    expected = torch.linalg.svd(weight, full_matrices=False)
    U, S, V = leading_singular(weight, 8, generator())
    torch.testing.assert_close(S, expected[1][:8])
    best = (expected[0][:, :8] * expected[1][:8]) @ expected[2][:8]
    torch.testing.assert_close((U * S) @ V, best, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"lora_alpha": 5}, {"use_rslora": True}])
def test_principal_part_is_the_product_of_both_halves(options: dict[str, float]) -> None:
    weight, config = matrix(), LoraConfig(r=8, **options)
    factors = principal(weight, config, generator())
    assert torch.linalg.matrix_norm(factors.taken_out_of(weight), 2) == pytest.approx(0.9**8, rel=1e-4)
    assert factors.scaling == config.scaling
    assert factors.A.norm() == pytest.approx(float(factors.B.norm()), rel=1e-4)


def test_loftq_leaves_less_than_quantizing_does() -> None:
    weight, config = matrix(256, 128), LoraConfig(r=16)
    initial, removed = loftq(weight, config, generator(), through_nf4, lambda factors: factors)
    assert removed is not None
    begun = through_nf4(removed.taken_out_of(weight)) + initial.product(CPU)
    plain = through_nf4(weight)
    once = plain + principal(weight - plain, config, generator()).product(CPU)
    errors = [float((weight - found).square().sum()) for found in (begun, once, plain)]
    assert errors == sorted(errors)
    assert errors[0] < 0.8 * errors[2]


def test_calibrated_pair_is_the_correction_of_its_rank() -> None:
    generator = torch.Generator().manual_seed(1)
    U = torch.linalg.qr(torch.randn(96, 12, generator=generator))[0]
    V = torch.randn(12, 64, generator=generator)
    V[3] = 0  # a direction without error
    config = LoraConfig(r=8, lora_alpha=24)
    factors = calibrated(Correction(U, V), config)
    assert factors.A.shape[0] == 7
    torch.testing.assert_close(factors.product(CPU), U[:, :8] @ V[:8])
    plain = torch.empty(4096, 64).uniform_(-1 / 8, 1 / 8, generator=generator).norm(dim=1)
    torch.testing.assert_close(factors.A.norm(dim=1), torch.full((7,), float(plain.mean())), rtol=0.02, atol=0)


@pytest.mark.parametrize("init", ["pissa", "loftq"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_taken_out_is_what_the_adapter_holds(init: str, dtype: str) -> None:
    config = LoraConfig(r=8, init=init, dtype=dtype, target_modules=("q_proj",), rank_pattern={"0.q_proj": 4})
    found = FoundResidual(config, 0, through_nf4)
    assert not found.reaches("layers.0.k_proj")
    weight = matrix()
    for path in ("layers.0.q_proj", "layers.1.q_proj"):
        assert found.reaches(path)
        residual = found(path, weight)
        assert torch.equal(residual, found.removed[path].taken_out_of(weight))
        held = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        assert found.initial[path].A.dtype == found.removed[path].B.dtype == held
    assert found.initial["layers.0.q_proj"].A.shape == (4, 64)
    assert found.initial["layers.1.q_proj"].A.shape == (8, 64)
    if init == "pissa":
        assert found.initial["layers.1.q_proj"].equals(found.removed["layers.1.q_proj"])


def test_same_seed_and_path_same_start() -> None:
    def start(seed: int) -> Factors:
        found = FoundResidual(LoraConfig(r=4, init="pissa"), seed, through_nf4)
        found("a", matrix())
        return found.initial["a"]

    assert start(0).equals(start(0))
    assert not start(0).equals(start(1))  # another start of the search: the same up to rounding
    torch.testing.assert_close(start(0).product(CPU), start(1).product(CPU), atol=1e-5, rtol=0)


def test_start_is_read_as_it_was_written(tmp_path) -> None:  # type: ignore[no-untyped-def]
    config = LoraConfig(r=4, rank_pattern={"b": 2})
    pairs = [Factors(torch.randn(r, 6), torch.randn(8, r), 32 / r) for r in (4, 2, 4)]
    start = AdapterStart({"a": pairs[0], "b": pairs[1]}, {"a": pairs[0]})
    other = AdapterStart(start.initial, {"a": pairs[2]})
    for written in (start, other, AdapterStart(start.initial)):
        written.write(tmp_path)
        found = AdapterStart.read(tmp_path, config)
        assert found is not None
        assert set(found.initial) == {"a", "b"}
        assert all(factors.equals(written.initial[path]) for path, factors in found.initial.items())
        assert set(found.removed) == set(written.removed)
        assert all(factors.equals(written.removed[path]) for path, factors in found.removed.items())
        assert found.initial["b"].scaling == 16
        assert found.residual_fingerprint("x") == written.residual_fingerprint("x")
    assert start.residual_fingerprint("x") != other.residual_fingerprint("x")
    assert start.residual_fingerprint("x") != start.residual_fingerprint("y")
    assert AdapterStart(start.initial).residual_fingerprint("x") is None


@pytest.mark.parametrize("change", [{"init": "pissa"}, {"init": "calibrated"}, {"save_as": "difference"}])
def test_dora_begins_at_zero(change: dict[str, str]) -> None:
    with pytest.raises(UserError, match="use_dora"):
        parse_section(LoraConfig, {"use_dora": True} | change)
