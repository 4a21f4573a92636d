"""AdamW kernels: each value is read once and written once. The references in `nybble.ops.adamw` are their definition.

Legend: tile = the values of one program; with 8-bit moments these are BLOCKS blocks of BLOCK_SIZE values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.ops.adamw import BLOCK_SIZE, first_moment_levels, second_moment_levels
from nybble.ops.nf4 import midpoints
from nybble.ops.triton.launch import WARP_SIZE, Card, KernelCase

_NUM_WARPS = 4
# 8 values a thread: two loads of 16 bytes from each fp32 tensor, one from a 16-bit one.
_TILE = 8 * WARP_SIZE * _NUM_WARPS
_BLOCK_TILE = {"BLOCKS": _TILE // BLOCK_SIZE, "BLOCK_SIZE": BLOCK_SIZE}


@triton.jit
def _one_minus_power(step, log_beta):
    """1 - beta**step without loss of digits: while the power is near 1, from the series of exp less its first term."""
    x = step * log_beta
    series = 1.0
    for i in tl.static_range(8):
        series = 1.0 + series * x / (9 - i)
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _update(p, g, m, v, lr, step, log_beta1, log_beta2, eps, weight_decay, BETA1: tl.constexpr, BETA2: tl.constexpr):
    m = BETA1 * m + (1 - BETA1) * g
    v = BETA2 * v + (1 - BETA2) * g * g
    denominator = tl.div_rn(tl.sqrt_rn(v), tl.sqrt_rn(_one_minus_power(step, log_beta2))) + eps
    step_size = tl.div_rn(lr, _one_minus_power(step, log_beta1))
    return p * (1 - lr * weight_decay) - step_size * tl.div_rn(m, denominator), m, v


@triton.jit
def adamw_kernel(
    parameter_ptr,  # (numel,)
    gradient_ptr,  # (numel,)
    exp_avg_ptr,  # fp32 (numel,)
    exp_avg_sq_ptr,  # fp32 (numel,)
    lr_ptr,  # scalar, as the next two
    step_ptr,
    gradient_scale_ptr,
    numel,
    log_beta1,
    log_beta2,
    eps,
    weight_decay,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    TILE: tl.constexpr,
):
    scale = tl.load(gradient_scale_ptr).to(tl.float32)
    if tl.abs(scale) < float("inf"):
        lr, step = tl.load(lr_ptr).to(tl.float32), tl.load(step_ptr).to(tl.float32)
        at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        inside = at < numel
        p = tl.load(parameter_ptr + at, mask=inside).to(tl.float32)
        g = tl.load(gradient_ptr + at, mask=inside).to(tl.float32) * scale
        m = tl.load(exp_avg_ptr + at, mask=inside).to(tl.float32)
        v = tl.load(exp_avg_sq_ptr + at, mask=inside).to(tl.float32)
        p, m, v = _update(p, g, m, v, lr, step, log_beta1, log_beta2, eps, weight_decay, BETA1, BETA2)
        tl.store(parameter_ptr + at, p.to(parameter_ptr.dtype.element_ty), mask=inside)
        tl.store(exp_avg_ptr + at, m, mask=inside)
        tl.store(exp_avg_sq_ptr + at, v, mask=inside)


@triton.jit
def _nearest(unit, borders_ptr, SIGNED: tl.constexpr):
    """The code of the level nearest to `unit`, in [-1, 1]; beside a border between levels the table decides.

    A decade's levels are evenly spaced, twice as many as those of the decade below. As a function of the magnitude the
    code is therefore a concave chain of 7 lines, their minimum, except that borders are up to a quarter of a code off
    it where decades meet: one look-up instead of 8 of a search.
    """
    magnitude = tl.minimum(tl.abs(unit), 1.0)  # 1 for NaN too: the code is an index
    count: tl.constexpr = 1 if SIGNED else 2  # levels in the lowest decade, from 1e-7 to 1e-6
    chain = 256.0
    for i in tl.static_range(7):
        first = count * 2**i - (0 if SIGNED else 1)
        chain = tl.minimum(chain, first + (magnitude * 10.0 ** (6 - i) - 0.1) * (count * 2**i / 0.9))
    lower = tl.floor(chain - 0.35).to(tl.int32)  # this code or the next
    if SIGNED:
        lower = tl.where(unit < 0, tl.maximum(126 - lower, 0), 127 + lower)
    return lower + (unit > tl.load(borders_ptr + lower)).to(tl.int32)


@triton.jit
def adamw_8bit_kernel(
    parameter_ptr,  # (numel,)
    gradient_ptr,  # (numel,)
    exp_avg_ptr,  # uint8 (numel,)
    exp_avg_scale_ptr,  # fp32 (blocks,)
    exp_avg_sq_ptr,  # uint8 (numel,)
    exp_avg_sq_scale_ptr,  # fp32 (blocks,)
    lr_ptr,  # scalar, as the next two
    step_ptr,
    gradient_scale_ptr,
    levels_ptr,  # fp32 (256,) of the first moment
    borders_ptr,  # fp32 (255,)
    levels_sq_ptr,  # fp32 (256,) of the second moment
    borders_sq_ptr,  # fp32 (255,)
    blocks,
    log_beta1,
    log_beta2,
    eps,
    weight_decay,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    scale = tl.load(gradient_scale_ptr).to(tl.float32)
    if tl.abs(scale) < float("inf"):
        lr, step = tl.load(lr_ptr).to(tl.float32), tl.load(step_ptr).to(tl.float32)
        block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        at = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
        within = block < blocks
        inside = within[:, None]
        p = tl.load(parameter_ptr + at, mask=inside).to(tl.float32)
        g = tl.load(gradient_ptr + at, mask=inside).to(tl.float32) * scale
        code = tl.load(exp_avg_ptr + at, mask=inside, other=0).to(tl.int32)
        code_sq = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0).to(tl.int32)
        m = tl.load(levels_ptr + code) * tl.load(exp_avg_scale_ptr + block, mask=within)[:, None]
        v = tl.load(levels_sq_ptr + code_sq) * tl.load(exp_avg_sq_scale_ptr + block, mask=within)[:, None]
        p, m, v = _update(p, g, m, v, lr, step, log_beta1, log_beta2, eps, weight_decay, BETA1, BETA2)
        tl.store(parameter_ptr + at, p.to(parameter_ptr.dtype.element_ty), mask=inside)

        absmax, absmax_sq = tl.max(tl.abs(m), axis=1), tl.max(v, axis=1)
        tl.store(exp_avg_scale_ptr + block, absmax, mask=within)
        tl.store(exp_avg_sq_scale_ptr + block, absmax_sq, mask=within)
        # A block of zeros: not 0 * inf.
        unit = tl.where(m == 0, 0.0, m * tl.div_rn(1.0, absmax)[:, None])
        unit_sq = tl.where(v == 0, 0.0, v * tl.div_rn(1.0, absmax_sq)[:, None])
        code_sq = tl.maximum(_nearest(unit_sq, borders_sq_ptr, False), (v > 0).to(tl.int32))
        tl.store(exp_avg_ptr + at, _nearest(unit, borders_ptr, True).to(tl.uint8), mask=inside)
        tl.store(exp_avg_sq_ptr + at, code_sq.to(tl.uint8), mask=inside)


def adamw_(*tensors: Tensor, beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
    """`adamw_` on the card; all arithmetic is in fp32."""
    constants = {"BETA1": beta1, "BETA2": beta2, "TILE": _TILE}
    _launch(adamw_kernel, -(-tensors[0].numel() // _TILE), tensors, tensors[0].numel(), eps, weight_decay, constants)


def adamw_8bit_(*tensors: Tensor, beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
    """`adamw_8bit_` on the card; all arithmetic is in fp32."""
    blocks = tensors[3].numel()
    constants = {"BETA1": beta1, "BETA2": beta2, **_BLOCK_TILE}
    tensors = (*tensors, *_tables(tensors[0].device))
    _launch(adamw_8bit_kernel, -(-blocks // _BLOCK_TILE["BLOCKS"]), tensors, blocks, eps, weight_decay, constants)


def _launch(
    kernel: Any,
    programs: int,
    tensors: Sequence[Tensor],
    count: int,
    eps: float,
    weight_decay: float,
    constants: dict[str, Any],
) -> None:
    if programs:
        log_betas = [math.log(beta) if beta else -math.inf for beta in (constants["BETA1"], constants["BETA2"])]
        with torch.cuda.device_of(tensors[0]):  # type: ignore[no-untyped-call]
            kernel[(programs,)](*tensors, count, *log_betas, eps, weight_decay, **constants, num_warps=_NUM_WARPS)


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, ...]:
    """Levels and borders of the first moment, then of the second."""
    maps = first_moment_levels(device), second_moment_levels(device)
    return tuple(table for levels in maps for table in (levels, midpoints(levels)))


def compile_cases(card: Card) -> list[KernelCase]:  # noqa: ARG001 (the same on every card)
    """All kernels as `FlatAdamW` launches them."""
    types = [(element, bits) for bits in (32, 8) for element in ("fp32", "bf16")]
    return [_case(element, bits) for element, bits in types]


def _case(element: str, bits: int) -> KernelCase:
    kernel, count = (adamw_kernel, "numel") if bits == 32 else (adamw_8bit_kernel, "blocks")
    constants = {"BETA1": 0.9, "BETA2": 0.999} | ({"TILE": _TILE} if bits == 32 else _BLOCK_TILE)
    signature = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
    signature |= {"parameter_ptr": f"*{element}", "gradient_ptr": f"*{element}"}
    if bits == 8:
        signature |= {"exp_avg_ptr": "*u8", "exp_avg_sq_ptr": "*u8"}
    signature[count] = "i32"
    signature |= dict.fromkeys(("log_beta1", "log_beta2", "eps", "weight_decay"), "fp32")
    name = "adamw" if bits == 32 else "adamw_8bit"
    return KernelCase(f"{name} {element}", kernel, signature, constants, _NUM_WARPS)
