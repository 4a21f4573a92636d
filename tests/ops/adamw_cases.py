"""States to update, the exact update, and PyTorch's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from nybble.ops.adamw import (
    BLOCK_SIZE,
    adamw_,
    dequantize_moment,
    first_moment_levels,
    midpoints,
    second_moment_levels,
)

OPTIONS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
CPU = torch.device("cpu")

# parameter, gradient, moments (each with its scale if it is in 8 bits), lr, step, gradient_scale
State = tuple[Tensor, ...]
Update = Callable[..., None]


def random_state(numel: int, *, step: int = 3, dtype: torch.dtype = torch.float32, bits: int = 32) -> State:
    """Gradients of six decades; every third parameter is zero, as lora_B begins."""
    generator = torch.Generator().manual_seed(numel + step)
    normal, uniform = (torch.randn(numel, generator=generator) for _ in range(2))
    size = 10 ** (6 * torch.rand(numel, generator=generator) - 6)
    parameter = 0.1 * normal * (torch.arange(numel) % 3 > 0)
    gradient = size * torch.randn(numel, generator=generator)
    scalars = (torch.tensor(2e-3), torch.tensor(float(step)), torch.tensor(0.3))
    if bits == 32:
        moments = (0.3 * size * uniform, (0.3 * size).square() * torch.rand(numel, generator=generator))
    else:
        codes = torch.randint(1, 256, (2, numel), generator=generator, dtype=torch.uint8)
        m_scale, v_scale = 1e-3 * torch.rand(2, numel // BLOCK_SIZE, generator=generator)
        moments = (codes[0], m_scale, codes[1], v_scale)
    return (parameter.to(dtype), gradient.to(dtype), *moments, *scalars)


def updated(update: Update, state: State, device: str = "cpu", **options: float) -> State:
    """`state` after `update`, on the CPU; `state` itself stays as it is."""
    copies = [tensor.to(device, copy=True) for tensor in state]
    update(*copies, **OPTIONS | options)
    return tuple(tensor.cpu() for tensor in copies)


def in_fp32(state: State) -> State:
    """An 8-bit state with its moments as numbers."""
    if len(state) == 7:
        return state
    m = dequantize_moment(state[2], state[3], first_moment_levels(CPU))
    v = dequantize_moment(state[4], state[5], second_moment_levels(CPU))
    return (*state[:2], m, v, *state[6:])


def exact(state: State, **options: float) -> State:
    """The update in fp64, moments as numbers."""
    return updated(adamw_, tuple(tensor.double() for tensor in in_fp32(state)), **options)


def torch_adamw(*state: Tensor, beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
    """PyTorch's update in place, for 16-bit parameters in fp32 and rounded once."""
    parameter, gradient, m, v, lr, step, scale = state
    value = parameter.to(m.dtype)
    options = {"beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    scaled = gradient.to(m.dtype) * scale
    single = ([value], [scaled], [m], [v], [], [step - 1])
    adamw(*single, foreach=False, amsgrad=False, maximize=False, lr=lr.item(), **options)
    parameter.copy_(value)


def errors(found: State, state: State) -> list[float]:
    """Of parameter and moments against `exact`, on average, as shares of the values before and after."""
    before, after, found = in_fp32(state), exact(state), in_fp32(found)
    shares = []
    for i in (0, 2, 3):
        size = before[i].double().abs() + after[i].abs()
        share = (found[i].double() - after[i]) / size.clamp(min=1e-30)
        shares.append(share.abs().mean().item())
    return shares


def assert_as_precise_as_torch(found: State, state: State) -> None:
    """What `found` of the update of `state` errs at most twice as much as PyTorch in the same dtype.

    In parameter and moments, or in the parameter alone where moments are rounded to 8 bits.
    """
    ours, theirs = errors(found, state), errors(updated(torch_adamw, in_fp32(state)), state)
    compared = 3 if len(state) == 7 else 1
    assert all(our <= 2 * their for our, their in zip(ours[:compared], theirs, strict=False)), (ours, theirs)


def assert_rounded_to_nearest(found: State, state: State) -> None:
    """8-bit moments after the update of `state` are at their nearest levels; second ones that are not zero, above it.

    Where two levels are equally near, rounding of the terms in fp32 decides.
    """
    before, after = in_fp32(state), exact(state)
    gradient = (state[1] * state[-1]).double()
    for values, terms, code, scale, levels in (
        (after[2], before[2].abs() + gradient.abs(), *found[2:4], first_moment_levels(CPU)),
        (after[3], before[3].abs() + gradient.square(), *found[4:6], second_moment_levels(CPU)),
    ):
        absmax = values.view(-1, BLOCK_SIZE).abs().amax(1)
        torch.testing.assert_close(scale.double(), absmax, rtol=1e-6, atol=0)
        unit = (values.view(-1, BLOCK_SIZE) / absmax[:, None]).view(-1)
        distance = (unit[:, None] - levels.double()).abs()
        nearest = distance[:, 1:].amin(1) if levels[0] == 0 else distance.amin(1)
        chosen = distance.gather(1, code.long()[:, None])[:, 0]
        assert (chosen - nearest <= 1e-6 * terms / absmax.repeat_interleave(BLOCK_SIZE)).all()


def beside_borders() -> tuple[State, dict[str, float]]:
    """Zero moments, and gradients that take them to the borders between levels and to the fp32 values beside these.

    With both betas at 1/2 the moments are half the gradient and half its square, without rounding or with the same in
    any order. Each block has its 255 borders and a peak that makes the scale 1.
    """
    first, second = (midpoints(levels(CPU)) for levels in (first_moment_levels, second_moment_levels))
    rows = []
    for border, to_gradient in ((first, lambda x: 2 * x), (second, lambda x: (2 * x).sqrt())):
        at = to_gradient(border)
        nudged = (torch.nextafter(at, torch.full_like(at, towards)) for towards in (-9.0, 9.0))
        peak = to_gradient(torch.ones(1))
        rows += [torch.cat([peak, row]) for row in (at, *nudged)]
    gradient = torch.cat(rows)
    scalars = (torch.tensor(1e-3), torch.tensor(1.0), torch.tensor(1.0))
    zeros = (torch.zeros(gradient.numel(), dtype=torch.uint8), torch.zeros(len(rows))) * 2
    return (torch.zeros_like(gradient), gradient, *zeros, *scalars), {"beta1": 0.5, "beta2": 0.5}
