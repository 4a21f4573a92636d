"""Errors that make up for each other: less of them in the outputs, in the same bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nybble.errors import UserError
from nybble.ops.nf4 import absmax_dequantize, levels
from nybble.quant.compensation import (
    AIM,
    DAMPING,
    Compensation,
    error_factor,
    output_error,
    quantize_compensated,
    refit_codes_,
    refit_scales,
)
from nybble.quant.format import NF4Spec
from nybble.quant.rounding import StoredAbsmax, quantize_searched, search_stored
from nybble.quant.weight import NF4Weight

SPECS = [NF4Spec(64, 256), NF4Spec(64, 0), NF4Spec(32, 16)]


def moments(features: int, tokens: int = 4000) -> Tensor:
    """Of inputs that go together and differ in size, as those of real layers do."""
    mixed = torch.randn(tokens, features // 4) @ torch.randn(features // 4, features)
    inputs = (mixed + torch.randn(tokens, features)) * torch.rand(features).add(0.1)
    return inputs.t() @ inputs / tokens


def error_of(weight: Tensor, quantized: NF4Weight, seen: Tensor) -> float:
    return output_error(weight, quantized.dequantize(torch.float32), seen)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(64, 256), (48, 96), (32, 72)])
def test_the_outputs_err_less(spec: NF4Spec, shape: tuple[int, int]) -> None:
    weight, seen = torch.randn(shape), moments(shape[1])
    plain, searched = NF4Weight.quantize(weight, spec), quantize_searched(weight, spec, importance=seen.diagonal())
    compensated = quantize_compensated(weight, Compensation.of(seen), spec)
    assert [tensor.dtype for tensor in compensated.tensors] == [tensor.dtype for tensor in plain.tensors]
    assert [tensor.shape for tensor in compensated.tensors] == [tensor.shape for tensor in plain.tensors]
    assert error_of(weight, compensated, seen) < 0.5 * error_of(weight, plain, seen)
    assert error_of(weight, compensated, seen) < 0.7 * error_of(weight, searched, seen)


def test_the_factor_is_of_the_inverse() -> None:
    seen = moments(40).double()
    order = torch.randperm(40)
    factor = error_factor(seen, order, 0.02)
    damped = (seen + 0.02 * seen.diagonal().median() * torch.eye(40))[order][:, order]
    torch.testing.assert_close(factor.t() @ factor @ damped, torch.eye(40).double())
    assert torch.equal(factor, factor.triu())


def test_the_factor_of_few_tokens_errs_as_their_condition_says() -> None:
    seen = moments(256, tokens=8)
    damped = seen.double() + 0.01 * seen.double().diagonal().median() * torch.eye(256)
    exact = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    gap = (error_factor(seen, torch.arange(256), 0.01) - exact).norm() / exact.norm()
    assert gap < torch.finfo(torch.float32).eps * torch.linalg.cond(damped)


@pytest.mark.parametrize("seed", range(12))
def test_moments_of_which_rounding_leaves_no_positive_inverse(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (3 * torch.rand(64, generator=generator) - 2)
    inputs = torch.randn(8, 64, generator=generator) * sizes
    factor = error_factor(inputs.t() @ inputs / 8, torch.arange(64), 3e-7)
    assert bool(factor.isfinite().all())
    assert bool((factor.diagonal() > 0).all())
    assert torch.equal(factor, factor.triu())


def test_columns_follow_the_definition() -> None:
    """One column after the other in float64, each error passed on by the inverse of what is left of the moments."""
    weight, seen = torch.randn(24, 128), moments(128)
    quantized = quantize_compensated(weight, Compensation.of(seen), NF4Spec(64, 0))
    found, absmax = quantized.dequantize(torch.float32).double(), quantized.absmax.view(24, 2).double()
    damped = seen.double() + DAMPING * seen.diagonal().median() * torch.eye(128)
    work, inverse = weight.double(), torch.linalg.inv(damped)
    for column in seen.diagonal().argsort(descending=True):
        candidates = levels(weight.device).double() * absmax[:, column // 64, None]
        distance = (candidates - work[:, column, None]).abs().amin(1)
        chosen = (found[:, column] - work[:, column]).abs()
        torch.testing.assert_close(chosen, distance, rtol=0, atol=1e-4)  # a value on a border may go either way
        error = (work[:, column] - found[:, column]) / inverse[column, column]
        work -= error[:, None] * inverse[column]
        inverse -= inverse[:, column, None] * inverse[None, column] / inverse[column, column]
        inverse[column, column] = 1.0  # its row and column are zero now, and this is not read again


def test_the_largest_inputs_are_not_moved() -> None:
    """What multiplies them is rounded as it was, before the errors of others could come to it."""
    weight, seen = torch.randn(32, 128), moments(128)
    seen[100] *= 10
    seen[:, 100] *= 10
    inputs = Compensation.of(seen)
    assert inputs.order[0] == 100
    quantized = quantize_compensated(weight, inputs, NF4Spec(64, 0))
    searched = quantize_searched(weight, NF4Spec(64, 0), importance=seen.diagonal())
    assert torch.equal(quantized.dequantize(torch.float32)[:, 100], searched.dequantize(torch.float32)[:, 100])


def test_one_token_far_larger_than_all_others_does_not_rule() -> None:
    """As the first one of a text is to some layers: what all others give still makes errors up for each other."""
    weight, others, large = torch.randn(32, 128), moments(128), 300 * torch.randn(128) * (torch.rand(128) < 0.05)
    compensated = quantize_compensated(weight, Compensation.of(others + torch.outer(large, large)), NF4Spec())
    searched = quantize_searched(weight, NF4Spec(), importance=others.diagonal())
    assert error_of(weight, compensated, others) < 0.8 * error_of(weight, searched, others)


def test_inputs_without_correlation_leave_nothing_to_compensate() -> None:
    weight, seen = torch.randn(32, 128), torch.eye(128)
    compensated, searched = (
        quantize_compensated(weight, Compensation.of(seen), NF4Spec(64, 0)),
        quantize_searched(weight, NF4Spec(64, 0)),
    )
    torch.testing.assert_close(
        compensated.dequantize(torch.float32), searched.dequantize(torch.float32), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(16, 128), (16, 72)])
def test_a_weight_of_zeros_stays_one(shape: tuple[int, int]) -> None:
    compensated = quantize_compensated(torch.zeros(shape), Compensation.of(moments(shape[1])), NF4Spec())
    assert not compensated.dequantize(torch.float32).any()


def test_inputs_that_are_never_there() -> None:
    seen = moments(64)
    seen[10], seen[:, 10] = 0, 0
    weight = torch.randn(16, 64)
    found = quantize_compensated(weight, Compensation.of(seen), NF4Spec()).dequantize(torch.float32)
    assert (found[:, 10] - weight[:, 10]).abs().max() < 0.5
    assert torch.isfinite(quantize_compensated(weight, Compensation.of(torch.zeros(64, 64)), NF4Spec()).offset).all()


def test_moments_of_few_tokens() -> None:
    weight, seen = torch.randn(16, 256), moments(256, tokens=8)
    compensated = quantize_compensated(weight, Compensation.of(seen), NF4Spec())
    assert error_of(weight, compensated, seen) < error_of(weight, NF4Weight.quantize(weight, NF4Spec()), seen)


def test_what_is_not_finite() -> None:
    seen = moments(64)
    weight = torch.randn(8, 64)
    weight[0, 0] = float("inf")
    with pytest.raises(UserError, match="NaN or infinite"):
        quantize_compensated(weight, Compensation.of(seen), NF4Spec())
    seen[3, 3] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        Compensation.of(seen)


def damped_error(weight: Tensor, other: Tensor, inputs: Compensation) -> float:
    difference = (weight - other).double()
    return float((difference @ inputs.metric.double() * difference).sum())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(64, 256), (48, 96), (32, 72)])
def test_every_round_errs_less(spec: NF4Spec, shape: tuple[int, int]) -> None:
    weight, inputs = torch.randn(shape), Compensation.of(moments(shape[1]))
    found = [quantize_compensated(weight, inputs, spec, rounds=rounds).dequantize(torch.float32) for rounds in range(4)]
    errors = [damped_error(weight, other, inputs) for other in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.97 * errors[0]


def test_codes_settle_where_no_other_is_better() -> None:
    spec, weight, inputs = NF4Spec(64, 0), torch.randn(4, 128), Compensation.of(moments(128))
    stored, table = search_stored(weight.reshape(-1), spec), levels(weight.device)
    index = torch.randint(16, weight.shape, dtype=torch.uint8)
    for _ in range(60):
        refit_codes_(index, weight, stored, inputs, spec)
    settled = index.clone()
    refit_codes_(index, weight, stored, inputs, spec)
    assert torch.equal(index, settled)
    absmax = stored.values.view(4, 2).repeat_interleave(64, 1)
    residual = (weight - table[index.int()] * absmax).double()
    for level in range(16):
        change = (table[level] * absmax - table[index.int()] * absmax).double()  # of each code alone
        gain = change.square() * inputs.metric.diagonal().double() - 2 * change * (residual @ inputs.metric.double())
        assert gain.min() > -1e-4


@pytest.mark.parametrize("spec", SPECS)
def test_scales_are_such_as_are_stored_and_err_less(spec: NF4Spec) -> None:
    weight, inputs = torch.randn(32, 128), Compensation.of(moments(128))
    first = search_stored(weight.reshape(-1), spec)
    index = torch.randint(16, weight.shape, dtype=torch.uint8)  # for which these scales are poor
    found = refit_scales(weight, index, first, inputs.metric, spec)
    read = found.absmax
    if found.group_absmax is not None and found.offset is not None:
        read = absmax_dequantize(found.absmax, found.group_absmax, found.offset, spec.group_size)
    assert torch.equal(found.values, read)

    def error(stored: StoredAbsmax) -> float:
        absmax = stored.values.repeat_interleave(spec.block_size).view_as(weight)
        return damped_error(weight, levels(weight.device)[index.int()] * absmax, inputs)

    assert error(found) < 0.7 * error(first)
    last = 128 // spec.block_size - 1  # the block that was set beside all others as they are
    for factor in (0.9, 1.1):
        values = found.values.view(32, -1).clone()
        values[:, last] *= factor
        assert error(found) < error(replace(found, values=values.view(-1)))


def test_what_a_weight_is_to_become_for_other_inputs() -> None:
    """The least squares over tokens in float64, with damping as so many more tokens that have not drifted."""
    x = torch.randn(500, 32) @ torch.randn(32, 32)
    y = x + 0.3 * torch.randn(500, 32) @ torch.randn(32, 32)
    weight, seen, drift = torch.randn(8, 32), y.t() @ y / 500, (x - y).t() @ y / 500
    inputs = Compensation.of(seen, 0.2)
    held = (500 * 0.2 * seen.diagonal().median()).sqrt() * torch.eye(32)
    wanted = torch.cat([x @ weight.t(), held @ weight.t()]).double()
    best = torch.linalg.lstsq(torch.cat([y, held]).double(), wanted).solution.t().float()
    torch.testing.assert_close(inputs.aim(weight, drift), torch.lerp(weight, best, AIM), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(best, weight, atol=0.1)
