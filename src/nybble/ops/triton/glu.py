"""Kernels of the gated linear unit; `nybble.ops.glu` is their definition.

A program takes the same BLOCK_T rows and BLOCK_N columns of gate, of up and of what becomes of them, so that it can
work in place. The low-rank products are made tile by tile in registers: at 8192 x 14336 a pass of their own would read
and write 940 MB, where all of `glu` moves 705 MB. The large loads come first, so that they are under way at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.ops.triton.launch import Card, KernelCase, card_of


@triton.jit
def tile_offsets(first_row, first_column, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where a tile begins, the places of its values from there on, and which of them are inside the matrix."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (first_row + row < rows) & (first_column + column < columns)
    return tl.cast(first_row, tl.int64) * stride + first_column, row * stride + column, inside


@triton.jit
def load_tile(ptr, first_row, first_column, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    start, offset, inside = tile_offsets(first_row, first_column, rows, columns, stride, ROWS, COLUMNS)
    return tl.load(ptr + start + offset, mask=inside, other=0.0)


@triton.jit
def store_tile(ptr, tile, first_row, first_column, rows, columns, stride):
    start, offset, inside = tile_offsets(first_row, first_column, rows, columns, stride, tile.shape[0], tile.shape[1])
    tl.store(ptr + start + offset, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_projections(
    gate_up_ptr,  # (tokens, 2 * intermediate)
    narrow_ptr,  # (tokens, PARTS * R)
    B_ptr,  # (2 * intermediate, R)
    scaling,
    t,
    n,
    tokens,
    intermediate,
    R: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """gate and up, fp32 (BLOCK_T, BLOCK_N)."""
    gate = load_tile(gate_up_ptr, t, n, tokens, intermediate, 2 * intermediate, BLOCK_T, BLOCK_N)
    up = load_tile(gate_up_ptr + intermediate, t, n, tokens, intermediate, 2 * intermediate, BLOCK_T, BLOCK_N)
    if R > 0:
        of_gate = load_tile(narrow_ptr, t, 0, tokens, R, PARTS * R, BLOCK_T, BLOCK_R)
        of_up = load_tile(narrow_ptr + (PARTS - 1) * R, t, 0, tokens, R, PARTS * R, BLOCK_T, BLOCK_R)
        B_gate = load_tile(B_ptr, n, 0, intermediate, R, R, BLOCK_N, BLOCK_R)
        B_up = load_tile(B_ptr + intermediate * R, n, 0, intermediate, R, R, BLOCK_N, BLOCK_R)
        gate = gate.to(tl.float32) + scaling * tl.dot(of_gate, tl.trans(B_gate), input_precision="ieee")
        up = up.to(tl.float32) + scaling * tl.dot(of_up, tl.trans(B_up), input_precision="ieee")
    return gate.to(tl.float32), up.to(tl.float32)


@triton.jit
def activation_parts(gate, GELU: tl.constexpr):
    """s = sigmoid(z) and dz / dgate, where the activation is gate * s."""
    z, slope = gate, 1.0
    if GELU:
        square = 0.044715 * gate * gate
        z = 1.5957691216057308 * gate * (1 + square)
        slope = 1.5957691216057308 * (1 + 3 * square)
    return tl.sigmoid(z), slope


@triton.jit
def glu_kernel(
    act_ptr,  # (tokens, intermediate)
    gate_up_ptr,
    narrow_ptr,
    B_ptr,
    scaling,
    tokens,
    intermediate,
    R: tl.constexpr,
    PARTS: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    t, n = tl.program_id(1) * BLOCK_T, tl.program_id(0) * BLOCK_N
    gate, up = load_projections(
        gate_up_ptr, narrow_ptr, B_ptr, scaling, t, n, tokens, intermediate, R, PARTS, BLOCK_R, BLOCK_T, BLOCK_N
    )
    s, _ = activation_parts(gate, GELU)
    store_tile(act_ptr, gate * s * up, t, n, tokens, intermediate, intermediate)


@triton.jit
def glu_backward_kernel(
    d_act_ptr,
    d_narrow_ptr,
    A_ptr,
    gate_up_ptr,
    narrow_ptr,
    B_ptr,
    scaling,
    tokens,
    intermediate,
    DOWN_R: tl.constexpr,
    DOWN_BLOCK_R: tl.constexpr,
    R: tl.constexpr,
    PARTS: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    t, n = tl.program_id(1) * BLOCK_T, tl.program_id(0) * BLOCK_N
    d = load_tile(d_act_ptr, t, n, tokens, intermediate, intermediate, BLOCK_T, BLOCK_N)
    gate, up = load_projections(
        gate_up_ptr, narrow_ptr, B_ptr, scaling, t, n, tokens, intermediate, R, PARTS, BLOCK_R, BLOCK_T, BLOCK_N
    )
    d = d.to(tl.float32)
    if DOWN_R > 0:
        d_narrow = load_tile(d_narrow_ptr, t, 0, tokens, DOWN_R, DOWN_R, BLOCK_T, DOWN_BLOCK_R)
        A = load_tile(A_ptr, 0, n, DOWN_R, intermediate, intermediate, DOWN_BLOCK_R, BLOCK_N)
        d += tl.dot(d_narrow, A, input_precision="ieee")
    s, slope = activation_parts(gate, GELU)
    act = gate * s
    store_tile(gate_up_ptr, d * up * (s + act * (1 - s) * slope), t, n, tokens, intermediate, 2 * intermediate)
    store_tile(gate_up_ptr + intermediate, d * act, t, n, tokens, intermediate, 2 * intermediate)
    store_tile(d_act_ptr, act * up, t, n, tokens, intermediate, intermediate)


def glu(
    gate_up: Tensor, narrow: Tensor | None, B: Tensor | None, scaling: float, parts: int, activation: str
) -> Tensor:
    """`nybble.ops.glu.glu` on the card."""
    act = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    constants = _constants(B, parts, activation)
    _launch(glu_kernel, act, gate_up, narrow, B, scaling, **constants)
    return act


def glu_backward_(
    d_act: Tensor,
    d_narrow: Tensor | None,
    A: Tensor | None,
    gate_up: Tensor,
    narrow: Tensor | None,
    B: Tensor | None,
    scaling: float,
    parts: int,
    activation: str,
) -> None:
    """`nybble.ops.glu.glu_backward_` on the card."""
    down_r = 0 if A is None else A.shape[0]
    constants = _constants(B, parts, activation) | {"DOWN_R": down_r, "DOWN_BLOCK_R": _block(down_r)}
    _launch(glu_backward_kernel, d_act, d_narrow, A, gate_up, narrow, B, scaling, **constants)


def _launch(kernel: Any, act: Tensor, *arguments: Any, **constants: Any) -> None:
    assert all(tensor.is_contiguous() for tensor in (act, *arguments) if isinstance(tensor, Tensor))
    tokens, intermediate = act.shape
    if act.numel():
        tile = _tile(card_of(act.device))
        grid = (-(-intermediate // tile["BLOCK_N"]), -(-tokens // tile["BLOCK_T"]))
        with torch.cuda.device_of(act):  # type: ignore[no-untyped-call]
            kernel[grid](act, *arguments, tokens, intermediate, **constants, **tile)


def _tile(card: Card) -> dict[str, int]:
    """BLOCK_T, BLOCK_N and num_warps.

    A thread holds 16 values of each matrix: two loads of 16 bytes. On Hopper 64 rows are what its matrix instructions
    take, and 58 registers a thread let 4 programs of `glu` share a multiprocessor, 86 let 2 of `glu_backward_`.
    """
    rows = 64 if card.capability[0] == 9 else 32
    return {"BLOCK_T": rows, "BLOCK_N": 64, "num_warps": rows // 8}


def _constants(B: Tensor | None, parts: int, activation: str) -> dict[str, Any]:
    r = 0 if B is None else B.shape[1]
    return {"R": r, "PARTS": parts, "GELU": activation == "gelu_tanh", "BLOCK_R": _block(r)}


def _block(r: int) -> int:
    block: int = triton.next_power_of_2(r)
    return max(16, block)  # a matrix instruction sums over 16


def compile_cases(card: Card) -> list[KernelCase]:
    """Both kernels with adapters of rank 16 around them, and with none."""
    return [case for r in (0, 16) for case in (_case(card, glu_kernel, r), _case(card, glu_backward_kernel, r))]


def _case(card: Card, kernel: Any, r: int) -> KernelCase:
    half = "*bf16" if card.capability >= (8, 0) else "*fp16"  # Triton has no bf16 on Turing
    types = {"scaling": "fp32", "tokens": "i32", "intermediate": "i32"}
    signature = {name: types.get(name, half) for name in kernel.arg_names if not name.isupper()}
    constants: dict[str, Any] = {"R": r, "BLOCK_R": _block(r), "DOWN_R": r, "DOWN_BLOCK_R": _block(r)}
    constants |= {"PARTS": 2, "GELU": False} | _tile(card)
    num_warps = constants.pop("num_warps")
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return KernelCase(f"{kernel.__name__.removesuffix('_kernel')} r={r}", kernel, signature, constants, num_warps)
