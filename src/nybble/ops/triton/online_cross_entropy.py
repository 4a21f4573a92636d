"""The kernels of the online cross-entropy; `nybble.ops.online_cross_entropy` is their definition.

A program takes a row. A chunk's logits are read twice, first for their maximum; in 8B, 10,000 of them are 20 KB, which
the second read finds in the multiprocessor's own cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.labels import IGNORED
from nybble.ops.triton.cross_entropy import launch_options, load_logits
from nybble.ops.triton.launch import Card, KernelCase, half_type

_MOST_COLUMNS = 2048  # of a hidden state at a time: 16 values a thread of 4 warps


@triton.jit
def online_cross_entropy_kernel(
    logits_ptr,  # (rows, columns)
    targets_ptr,  # int64 (rows,)
    weight_ptr,  # (columns, hidden)
    state_ptr,  # fp32 (3, rows)
    gradient_ptr,  # fp32 (rows, hidden)
    target_rows_ptr,  # (rows, hidden)
    rows,
    columns,
    hidden,
    first,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    IGNORED: tl.constexpr,
    VECTORS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    BLOCK: tl.constexpr = VECTORS * WIDTH
    row = tl.program_id(0)
    target = tl.load(targets_ptr + row)
    logits_ptr += row.to(tl.int64) * columns
    gradient_ptr += row.to(tl.int64) * hidden
    target_rows_ptr += row.to(tl.int64) * hidden
    place = tl.arange(0, VECTORS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    if target == IGNORED:
        if WITH_GRADIENT:
            for start in range(0, columns, BLOCK):
                zeros = tl.zeros((VECTORS, WIDTH), logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + start + place, zeros, mask=start + place < columns)
    else:
        column_of_target = target - first
        here = (column_of_target >= 0) & (column_of_target < columns)
        top_before = tl.load(state_ptr + row)
        others = tl.load(state_ptr + rows + row)
        if here:
            # Before the reductions below, which no thread passes alone: later on it may be overwritten.
            target_z = load_logits(logits_ptr, column_of_target, columns, scale, softcap, CAPPED)[0]
            tl.store(state_ptr + 2 * rows + row, target_z)
        highest = tl.full((VECTORS,), -3.4e38, tl.float32)
        for start in range(0, columns, BLOCK):
            z = load_logits(logits_ptr, start + place, columns, scale, softcap, CAPPED)[0]
            z = tl.where(start + place == column_of_target, float("-inf"), z)
            highest = tl.maximum(highest, tl.max(z, axis=1))
        top = tl.maximum(top_before, tl.max(highest, axis=0))

        sums = tl.zeros((VECTORS,), tl.float32)
        last = tl.cdiv(columns, BLOCK) - 1
        for i in range(0, last + 1):
            column = (last - i) * BLOCK + place
            z, slope = load_logits(logits_ptr, column, columns, scale, softcap, CAPPED)
            factors = tl.where(column == column_of_target, 0.0, tl.exp(z - top))
            sums += tl.sum(factors, axis=1)
            if WITH_GRADIENT:
                tl.store(logits_ptr + column, (factors * slope).to(logits_ptr.dtype.element_ty), mask=column < columns)
        shrink = tl.exp(top_before - top)
        tl.store(state_ptr + row, top)
        tl.store(state_ptr + rows + row, others * shrink + tl.sum(sums, axis=0))

        if WITH_GRADIENT:
            if top > top_before:  # of random words, the n-th is the largest so far with a probability of 1 / n
                for start in range(0, hidden, BLOCK):
                    inside = start + place < hidden
                    gradient = tl.load(gradient_ptr + start + place, mask=inside)
                    tl.store(gradient_ptr + start + place, gradient * shrink, mask=inside)
            if here:
                weight_ptr += column_of_target * hidden
                for start in range(0, hidden, BLOCK):
                    inside = start + place < hidden
                    values = tl.load(weight_ptr + start + place, mask=inside)
                    tl.store(target_rows_ptr + start + place, values, mask=inside)


@triton.jit
def online_cross_entropy_end_kernel(
    losses_ptr,  # fp32 (rows,)
    d_hidden_ptr,  # (rows, hidden)
    state_ptr,  # fp32 (3, rows)
    targets_ptr,  # int64 (rows,)
    gradient_ptr,  # fp32 (rows, hidden)
    target_rows_ptr,  # (rows, hidden)
    rows,
    hidden,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    counted = tl.load(targets_ptr + row) != IGNORED
    top = tl.load(state_ptr + row)
    others = tl.load(state_ptr + rows + row)
    z = tl.load(state_ptr + 2 * rows + row)
    highest = tl.maximum(top, z)
    shrink = tl.exp(top - highest)
    others *= shrink
    total = others + tl.exp(z - highest)
    tl.store(losses_ptr + row, tl.where(counted, tl.log(total) + (highest - z), 0.0))
    if WITH_GRADIENT:
        slope = scale
        if CAPPED:
            unit = z / softcap
            slope = scale * (1 - unit * unit)
        of_others = tl.div_rn(shrink, total)
        of_target = slope * tl.div_rn(others, total)
        start_of_row = row.to(tl.int64) * hidden
        for start in range(0, hidden, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < hidden
            gradient = tl.load(gradient_ptr + start_of_row + column, mask=inside & counted, other=0.0)
            target_row = tl.load(target_rows_ptr + start_of_row + column, mask=inside & counted, other=0.0)
            d = gradient * of_others - target_row.to(tl.float32) * of_target
            tl.store(d_hidden_ptr + start_of_row + column, d.to(d_hidden_ptr.dtype.element_ty), mask=inside)


def online_cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    first: int,
    weight: Tensor,
    state: Tensor,
    gradient: Tensor | None,
    target_rows: Tensor | None,
    scale: float,
    softcap: float | None,
) -> None:
    """`nybble.ops.online_cross_entropy.online_cross_entropy_` on the card."""
    rows, columns = logits.shape
    if not rows or not columns:
        return
    written = [tensor for tensor in (gradient, target_rows) if tensor is not None]
    assert all(tensor.is_contiguous() for tensor in (logits, weight, state, *written))
    constants, num_warps = launch_options(columns)
    constants |= _constants(softcap, gradient)
    # What is not there is not read.
    gradient, target_rows = (state if tensor is None else tensor for tensor in (gradient, target_rows))
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        online_cross_entropy_kernel[(rows,)](
            *(logits, targets, weight, state, gradient, target_rows),
            *(rows, columns, weight.shape[1], first, scale, softcap or 0.0),
            **constants,
            num_warps=num_warps,
        )


def online_cross_entropy_end(
    state: Tensor,
    targets: Tensor,
    gradient: Tensor | None,
    target_rows: Tensor | None,
    d_hidden: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """`nybble.ops.online_cross_entropy.online_cross_entropy_end` on the card."""
    rows = state.shape[1]
    losses = torch.empty_like(state[0])
    constants = _constants(softcap, d_hidden)
    hidden = 0 if d_hidden is None else d_hidden.shape[1]
    tensors = [state if tensor is None else tensor for tensor in (gradient, target_rows, d_hidden)]
    assert all(tensor.is_contiguous() for tensor in tensors)
    if rows:
        with torch.cuda.device_of(state):  # type: ignore[no-untyped-call]
            online_cross_entropy_end_kernel[(rows,)](
                *(losses, tensors[2], state, targets, *tensors[:2], rows, hidden, scale, softcap or 0.0),
                **constants,
                BLOCK=_block(hidden),
                num_warps=4,
            )
    return losses


def _constants(softcap: float | None, gradient: Tensor | None) -> dict[str, Any]:
    return {"CAPPED": softcap is not None, "WITH_GRADIENT": gradient is not None, "IGNORED": IGNORED}


def _block(hidden: int) -> int:
    return min(_MOST_COLUMNS, int(triton.next_power_of_2(max(hidden, 1))))


def compile_cases(card: Card) -> list[KernelCase]:
    """A chunk of a large vocabulary, with and without a soft cap and a gradient, and the end."""
    half = f"*{half_type(card)}"
    types = {"logits_ptr": half, "weight_ptr": half, "target_rows_ptr": half, "d_hidden_ptr": half}
    types |= {"targets_ptr": "*i64", "losses_ptr": "*fp32", "state_ptr": "*fp32", "gradient_ptr": "*fp32"}
    types |= {"rows": "i32", "columns": "i32", "hidden": "i32", "first": "i32", "scale": "fp32", "softcap": "fp32"}
    tile, num_warps = launch_options(10_000)
    cases = []
    for capped, with_gradient in ((False, True), (True, True), (False, False)):
        rule = {"CAPPED": capped, "WITH_GRADIENT": with_gradient, "IGNORED": IGNORED}
        name = f"online_ce{' softcap' * capped}{' loss' * (not with_gradient)}"
        cases.append(_case(name, online_cross_entropy_kernel, types, rule | tile, num_warps))
        cases.append(_case(f"{name} end", online_cross_entropy_end_kernel, types, rule | {"BLOCK": _block(4096)}, 4))
    return cases


def _case(name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], num_warps: int) -> KernelCase:
    named = {argument: kind for argument, kind in types.items() if argument in kernel.arg_names}
    return KernelCase(name, kernel, named, constants, num_warps)
