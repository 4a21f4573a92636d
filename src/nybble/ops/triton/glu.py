"""Kernels of the gated linear unit; `nybble.ops.glu` is their definition.

A program takes the same BLOCK_T rows and BLOCK_N columns of gate, of up and of what becomes of them, so that it can
work in place. The low-rank products are made tile by tile in registers: at 8192 x 14336 a pass of their own would read
and write 940 MB, where all of `glu` moves 705 MB. All loads are issued before the first product waits for its own.

A matrix instruction leaves a thread products of pairs of columns; memory wants eight in a row. So the operands take the
tile's rows and columns in the order of `dot_rows` and `dot_columns`, in which a thread gets the products of just the
values that it loads. Nothing then changes threads: a tile of the backward pass has one barrier, where it had 13.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nybble.ops.triton.launch import Card, KernelCase, half_type


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
def dot_rows(BLOCK_T: tl.constexpr):
    """The order in which an operand takes a tile's rows: its 16 i + 8 j + k is the tile's BLOCK_T / 2 j + 8 i + k."""
    row = tl.arange(0, BLOCK_T)
    return row // 8 % 2 * (BLOCK_T // 2) + row // 16 * 8 + row % 8


@triton.jit
def dot_columns(BLOCK_N: tl.constexpr):
    """And its columns: of each 32, the operand's 8 i + 2 j + k is the tile's 8 j + 2 i + k."""
    column = tl.arange(0, BLOCK_N)
    return column // 32 * 32 + column % 8 // 2 * 8 + column % 32 // 8 * 2 + column % 2


@triton.jit
def product(a, b):
    """a @ b in fp32, for operands in that order; rows and columns are named again as the tile has them."""
    T: tl.constexpr = a.shape[0]
    N: tl.constexpr = b.shape[1]
    c = tl.reshape(tl.dot(a, b, input_precision="ieee"), (T // 16, 2, 8, N // 32, 4, 4, 2))
    return tl.reshape(tl.permute(c, (1, 0, 2, 3, 5, 4, 6)), (T, N))


@triton.jit
def load_narrow(ptr, t, tokens, stride, R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr):
    """A tile's rows of narrow, of whose columns R are taken, in the order of an operand."""
    row, r = dot_rows(BLOCK_T)[:, None], tl.arange(0, BLOCK_R)[None, :]
    start = tl.cast(t, tl.int64) * stride
    return tl.load(ptr + start + row * stride + r, mask=(t + row < tokens) & (r < R), other=0.0)


@triton.jit
def load_wide(ptr, n, intermediate, stride_r, stride_n, R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile's columns of A, or of B transposed, in the order of an operand."""
    r, column = tl.arange(0, BLOCK_R)[:, None], n + dot_columns(BLOCK_N)[None, :]
    return tl.load(ptr + r * stride_r + column * stride_n, mask=(r < R) & (column < intermediate), other=0.0)


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
    gate = load_tile(gate_up_ptr, t, n, tokens, intermediate, 2 * intermediate, BLOCK_T, BLOCK_N)
    up = load_tile(gate_up_ptr + intermediate, t, n, tokens, intermediate, 2 * intermediate, BLOCK_T, BLOCK_N)
    if R > 0:
        of_gate = load_narrow(narrow_ptr, t, tokens, PARTS * R, R, BLOCK_R, BLOCK_T)
        of_up = load_narrow(narrow_ptr + (PARTS - 1) * R, t, tokens, PARTS * R, R, BLOCK_R, BLOCK_T)
        B_gate = load_wide(B_ptr, n, intermediate, 1, R, R, BLOCK_R, BLOCK_N)
        B_up = load_wide(B_ptr + intermediate * R, n, intermediate, 1, R, R, BLOCK_R, BLOCK_N)
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    if R > 0:
        gate += scaling * product(of_gate, B_gate)
        up += scaling * product(of_up, B_up)
    s, _ = activation_parts(gate, GELU)
    store_tile(act_ptr, gate * s * up, t, n, tokens, intermediate, intermediate)


@triton.jit
def glu_backward_tile(
    d_act_ptr,
    d_narrow_ptr,
    A_ptr,
    gate_up_ptr,
    narrow_ptr,
    B_ptr,
    scaling,
    tokens,
    intermediate,
    t,
    n,
    DOWN_R: tl.constexpr,
    DOWN_BLOCK_R: tl.constexpr,
    R: tl.constexpr,
    PARTS: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient in the tile that begins at token t and column n."""
    gate = load_tile(gate_up_ptr, t, n, tokens, intermediate, 2 * intermediate, BLOCK_T, BLOCK_N)
    up = load_tile(gate_up_ptr + intermediate, t, n, tokens, intermediate, 2 * intermediate, BLOCK_T, BLOCK_N)
    d = load_tile(d_act_ptr, t, n, tokens, intermediate, intermediate, BLOCK_T, BLOCK_N)
    if R > 0:
        of_gate = load_narrow(narrow_ptr, t, tokens, PARTS * R, R, BLOCK_R, BLOCK_T)
        of_up = load_narrow(narrow_ptr + (PARTS - 1) * R, t, tokens, PARTS * R, R, BLOCK_R, BLOCK_T)
        B_gate = load_wide(B_ptr, n, intermediate, 1, R, R, BLOCK_R, BLOCK_N)
        B_up = load_wide(B_ptr + intermediate * R, n, intermediate, 1, R, R, BLOCK_R, BLOCK_N)
    if DOWN_R > 0:
        d_narrow = load_narrow(d_narrow_ptr, t, tokens, DOWN_R, DOWN_R, DOWN_BLOCK_R, BLOCK_T)
        A = load_wide(A_ptr, n, intermediate, intermediate, 1, DOWN_R, DOWN_BLOCK_R, BLOCK_N)
    gate, up, d = gate.to(tl.float32), up.to(tl.float32), d.to(tl.float32)
    if R > 0:
        gate += scaling * product(of_gate, B_gate)
        up += scaling * product(of_up, B_up)
    if DOWN_R > 0:
        d += product(d_narrow, A)
    s, slope = activation_parts(gate, GELU)
    act = gate * s
    store_tile(gate_up_ptr, d * up * (s + act * (1 - s) * slope), t, n, tokens, intermediate, 2 * intermediate)
    store_tile(gate_up_ptr + intermediate, d * act, t, n, tokens, intermediate, 2 * intermediate)
    store_tile(d_act_ptr, act * up, t, n, tokens, intermediate, intermediate)


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
    TILES: tl.constexpr,  # that a program takes, side by side
):
    t, first = tl.program_id(1) * BLOCK_T, tl.program_id(0) * (BLOCK_N * TILES)
    for n in tl.range(first, min(first + BLOCK_N * TILES, intermediate), BLOCK_N, num_stages=1):
        glu_backward_tile(
            d_act_ptr, d_narrow_ptr, A_ptr, gate_up_ptr, narrow_ptr, B_ptr, scaling, tokens, intermediate, t, n,
            DOWN_R, DOWN_BLOCK_R, R, PARTS, GELU, BLOCK_R, BLOCK_T, BLOCK_N,
        )  # fmt: skip


def glu(
    gate_up: Tensor, narrow: Tensor | None, B: Tensor | None, scaling: float, parts: int, activation: str
) -> Tensor:
    """`nybble.ops.glu.glu` on the card."""
    act = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    constants = _constants(B, parts, activation) | _TILE
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
    constants |= _backward_tile(constants["R"] > 0 or down_r > 0)
    _launch(glu_backward_kernel, d_act, d_narrow, A, gate_up, narrow, B, scaling, **constants)


def _launch(kernel: Any, act: Tensor, *arguments: Any, **constants: Any) -> None:
    assert all(tensor.is_contiguous() for tensor in (act, *arguments) if isinstance(tensor, Tensor))
    tokens, intermediate = act.shape
    if act.numel():
        columns = constants["BLOCK_N"] * constants.get("TILES", 1)
        grid = (-(-intermediate // columns), -(-tokens // constants["BLOCK_T"]))
        with torch.cuda.device_of(act):  # type: ignore[no-untyped-call]
            kernel[grid](act, *arguments, tokens, intermediate, **constants)


# A thread holds 16 values of each matrix: two loads of 16 bytes.
_TILE = {"BLOCK_T": 64, "BLOCK_N": 64, "num_warps": 8}


def _backward_tile(adapted: bool) -> dict[str, int]:
    """BLOCK_T, BLOCK_N, TILES and num_warps.

    Products want a warp to hold 32 columns, as matrix instructions deal them out, and 64 rows, which Hopper's take.
    At 8192 x 14336 with r = 16 an H100 takes 580 us so, 628 us with a program a tile, 620 us with tiles of 64 columns.
    """
    return {"BLOCK_T": 64, "BLOCK_N": 32, "TILES": 4, "num_warps": 4} if adapted else _TILE | {"TILES": 1}


def _constants(B: Tensor | None, parts: int, activation: str) -> dict[str, Any]:
    r = 0 if B is None else B.shape[1]
    return {"R": r, "PARTS": parts, "GELU": activation == "gelu_tanh", "BLOCK_R": _block(r)}


def _block(r: int) -> int:
    block: int = triton.next_power_of_2(r)
    return max(16, block)  # a matrix instruction sums over 16


def compile_cases(card: Card) -> list[KernelCase]:
    """Both kernels with adapters of rank 16 around them, and with none."""
    return [
        case
        for r in (0, 16)
        for case in (
            _case(card, glu_kernel, r, _TILE),
            _case(card, glu_backward_kernel, r, _backward_tile(r > 0)),
        )
    ]


def _case(card: Card, kernel: Any, r: int, tile: dict[str, int]) -> KernelCase:
    half = f"*{half_type(card)}"
    types = {"scaling": "fp32", "tokens": "i32", "intermediate": "i32"}
    signature = {name: types.get(name, half) for name in kernel.arg_names if not name.isupper()}
    constants: dict[str, Any] = {"R": r, "BLOCK_R": _block(r), "DOWN_R": r, "DOWN_BLOCK_R": _block(r)}
    constants |= {"PARTS": 2, "GELU": False} | tile
    num_warps = constants.pop("num_warps")
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return KernelCase(f"{kernel.__name__.removesuffix('_kernel')} r={r}", kernel, signature, constants, num_warps)
