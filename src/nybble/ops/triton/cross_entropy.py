"""The cross-entropy kernel; `nybble.ops.cross_entropy` is its definition.

Two reads and a write of the logits; the second read should find them in the L2 cache. A program takes a row, with 1,024
threads, so that few rows are under way: on an H100 264, which at 128,256 logits in bf16 are 68 MB, half of it read once
and not yet twice, and its cache holds 50. The second read goes backwards: what was read last is what a cache holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.labels import IGNORED
from nybble.ops.triton.launch import WARP_SIZE, Card, KernelCase, half_type

# Values of a vector, which one thread loads at once: 16 bytes in 16 bits each.
_WIDTH = 8


@triton.jit
def tanh(x):
    """To the last bits of fp32: near 0, where the quotient would lose them, a series (Cephes, tanhf)."""
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    return tl.where(square < 0.390625, x + x * square * series, 1 - 2 / (tl.exp(2 * x) + 1))


@triton.jit
def load_logits(ptr, column, vocabulary, scale, softcap, CAPPED: tl.constexpr):
    """The model's logits z, -inf beyond the vocabulary, and dz / dx."""
    z = tl.load(ptr + column, mask=column < vocabulary, other=0.0).to(tl.float32) * scale
    slope = scale
    if CAPPED:
        unit = tanh(z / softcap)
        z = softcap * unit
        slope = scale * (1 - unit * unit)
    return tl.where(column < vocabulary, z, float("-inf")), slope


@triton.jit
def cross_entropy_kernel(
    losses_ptr,  # fp32 (rows,)
    logits_ptr,  # (rows, vocabulary)
    targets_ptr,  # int64 (rows,)
    vocabulary,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    IGNORED: tl.constexpr,
    VECTORS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    BLOCK: tl.constexpr = VECTORS * WIDTH
    row = tl.program_id(0)
    target = tl.load(targets_ptr + row)
    logits_ptr += row.to(tl.int64) * vocabulary
    place = tl.arange(0, VECTORS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    if target == IGNORED:
        tl.store(losses_ptr + row, 0.0)
        for start in range(0, vocabulary, BLOCK):
            column = start + place
            zeros = tl.zeros((VECTORS, WIDTH), logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + column, zeros, mask=column < vocabulary)
    else:
        # Before the reductions below, which no thread passes alone: later on it may be overwritten.
        target_z = load_logits(logits_ptr, target, vocabulary, scale, softcap, CAPPED)[0]
        # A running maximum and sum for each vector: one exponential a value, and one more for WIDTH of them.
        top = tl.full((VECTORS,), -3.4e38, tl.float32)
        total = tl.zeros((VECTORS,), tl.float32)
        for start in range(0, vocabulary, BLOCK):
            z = load_logits(logits_ptr, start + place, vocabulary, scale, softcap, CAPPED)[0]
            higher = tl.maximum(top, tl.max(z, axis=1))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher[:, None]), axis=1)
            top = higher
        row_top = tl.max(top, axis=0)
        row_total = tl.sum(total * tl.exp(top - row_top), axis=0)
        tl.store(losses_ptr + row, tl.log(row_total) - (target_z - row_top))

        factor = tl.div_rn(1.0, row_total)
        last = tl.cdiv(vocabulary, BLOCK) - 1
        for i in range(0, last + 1):
            column = (last - i) * BLOCK + place
            z, slope = load_logits(logits_ptr, column, vocabulary, scale, softcap, CAPPED)
            gradient = tl.exp(z - row_top) * factor - (column == target).to(tl.float32)
            tl.store(logits_ptr + column, (slope * gradient).to(logits_ptr.dtype.element_ty), mask=column < vocabulary)


def launch_options(vocabulary: int) -> tuple[dict[str, int], int]:
    """Constants and number of warps: two vectors a thread, and all the threads that a row has work for."""
    vectors = min(2 * 1024, triton.next_power_of_2(-(-vocabulary // _WIDTH)))
    return {"VECTORS": vectors, "WIDTH": _WIDTH}, max(1, min(32, vectors // 2 // WARP_SIZE))


def cross_entropy_(logits: Tensor, targets: Tensor, scale: float, softcap: float | None) -> Tensor:
    """`nybble.ops.cross_entropy.cross_entropy_` on the card."""
    assert logits.is_contiguous()
    rows, vocabulary = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    if rows:
        constants, num_warps = launch_options(vocabulary)
        constants |= {"CAPPED": softcap is not None, "IGNORED": IGNORED}
        with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
            cross_entropy_kernel[(rows,)](
                losses, logits, targets, vocabulary, scale, softcap or 0.0, **constants, num_warps=num_warps
            )
    return losses


def compile_cases(card: Card) -> list[KernelCase]:
    """The kernel for a large vocabulary, without and with a soft cap."""
    constants, num_warps = launch_options(128256)
    element_type = f"*{half_type(card)}"
    types = {"losses_ptr": "*fp32", "logits_ptr": element_type, "targets_ptr": "*i64", "vocabulary": "i32"}
    types |= {"scale": "fp32", "softcap": "fp32"}
    return [
        KernelCase(
            f"cross_entropy{' softcap' * capped}",
            cross_entropy_kernel,
            types,
            constants | {"CAPPED": capped, "IGNORED": IGNORED},
            num_warps,
        )
        for capped in (False, True)
    ]
