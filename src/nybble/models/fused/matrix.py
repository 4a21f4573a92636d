"""Frozen weights stacked into one matrix, in the form that the matrix products of a precision want.

Legend: tokens; in, out = features of all linears together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nybble.models.fused.reason import CannotFuseError
from nybble.models.fused.stacked import joined, stacked
from nybble.ops.fp8 import (
    E4M3,
    fp8_matmul,
    fp8_quantize_rows,
    fp8_quantize_weight_into,
    nf4_dequantize_fp8_into,
)
from nybble.quant.linear import DenseLinear, NF4Linear
from nybble.quant.weight import dequantize_stack_

Linear = DenseLinear | NF4Linear


class Rows8(NamedTuple):
    """Rows (tokens, in) in e4m3 with a scale each, (tokens, 1), as `fp8_quantize_rows` gives them."""

    values: Tensor
    scale: Tensor


class FrozenMatrix(Protocol):
    """A weight (out, in) that is multiplied and never trained. reads_fp8: whether `product` has a use for rows8."""

    linears: Sequence[Linear]
    shape: tuple[int, int]
    reads_fp8: bool

    def product(self, x: Tensor, bias: Tensor | None, rows8: Rows8 | None = None) -> Tensor:
        """x W^T + bias, (tokens, out). rows8: those of x, if what made x gave them too."""

    def gradient(self, d_output: Tensor) -> Tensor:
        """d_output W, (tokens, in)."""

    def hold(self, holding: bool, *, one_gradient: bool = False) -> None:
        """See `held_weight`."""

    def follow(self, ready: Callable[[], None]) -> None:
        """Call `ready` before the stored weights are read: they are brought to the device only then."""


def frozen_matrix(linears: Sequence[Linear], *, precision: str, device: torch.device, resident: bool) -> FrozenMatrix:
    """The weights of `linears`, for products on `device` in fp8 or (bf16) in their compute dtype.

    resident: they stay there; otherwise `FrozenMatrix.follow` is to be told how they get there.
    """
    if precision == "fp8" and linears[0].compute_dtype != torch.bfloat16:
        raise CannotFuseError("products in fp8 give bf16, and model.compute is another dtype")
    return Float8Matrix(linears, device) if precision == "fp8" else HalfMatrix(linears, resident=resident)


@contextlib.contextmanager
def held_weight(*matrices: FrozenMatrix, one_gradient: bool = False) -> Iterator[None]:
    """Within, what is materialized for a product serves all that follow too; one_gradient: up to the first gradient."""
    for matrix in matrices:
        matrix.hold(True, one_gradient=one_gradient)
    try:
        yield
    finally:
        for matrix in matrices:
            matrix.hold(False)


class HalfMatrix:
    """In the compute dtype, materialized for each product; as it is where the weights are held in that dtype."""

    reads_fp8 = False

    def __init__(self, linears: Sequence[Linear], *, resident: bool = True) -> None:
        self.linears = linears
        self.out_features = [linear.out_features for linear in linears]
        self.shape = (sum(self.out_features), linears[0].in_features)
        self.dtype = linears[0].compute_dtype
        dense = [linear.weight for linear in linears if isinstance(linear, DenseLinear)]
        as_multiplied = all(weight.dtype == self.dtype for weight in dense) and len(dense) == len(linears)
        self.dense = dense if as_multiplied else []
        self.resident = stacked(dense).detach() if as_multiplied and resident else None
        self.ready: Callable[[], None] | None = None
        self.holding = False
        self.one_gradient = False
        self.held: Tensor | None = None

    def product(self, x: Tensor, bias: Tensor | None, rows8: Rows8 | None = None) -> Tensor:  # noqa: ARG002
        return torch.nn.functional.linear(x, self._weight(x.device), bias)

    def gradient(self, d_output: Tensor) -> Tensor:
        weight = self._weight(d_output.device)
        if self.one_gradient:
            self.hold(False)
        return d_output @ weight

    def hold(self, holding: bool, *, one_gradient: bool = False) -> None:
        self.holding, self.one_gradient, self.held = holding, one_gradient, None

    def follow(self, ready: Callable[[], None]) -> None:
        self.ready = ready

    def _weight(self, device: torch.device) -> Tensor:
        if self.held is not None:
            return self.held
        weight = self.materialize(device)
        self.held = weight if self.holding else None
        return weight

    def materialize(self, device: torch.device) -> Tensor:
        if self.resident is not None:
            return self.resident
        if self.ready is not None:
            self.ready()
        if self.dense:
            side_by_side = joined(self.dense)
            return torch.cat([weight.detach() for weight in self.dense]) if side_by_side is None else side_by_side
        weight = torch.empty(self.shape, dtype=self.dtype, device=device)
        packed = [linear.nf4_weight for linear in self.linears if isinstance(linear, NF4Linear)]
        if len(packed) == len(self.linears) and len({held.spec for held in packed}) == 1:
            dequantize_stack_(weight, packed)
            return weight
        for linear, rows in zip(self.linears, torch.split(weight, self.out_features), strict=True):
            rows.copy_(linear.dequantize(self.dtype))
        return weight


class Float8Matrix:
    """In e4m3 with a scale a row, quantized for each product; inputs and gradients with a scale a token."""

    reads_fp8 = True

    def __init__(self, linears: Sequence[Linear], device: torch.device) -> None:
        self.linears = linears
        self.out_features = [linear.out_features for linear in linears]
        self.shape = (sum(self.out_features), linears[0].in_features)
        _require_fp8_sizes(linears)
        self.unit = torch.ones(1, linears[0].in_features, device=device)
        self.ready: Callable[[], None] | None = None
        self.holding = False
        self.held: dict[bool, tuple[Tensor, Tensor]] = {}  # by `transposed`

    def product(self, x: Tensor, bias: Tensor | None, rows8: Rows8 | None = None) -> Tensor:
        weight, scale = self._weight(transposed=False)
        rows8 = rows8 or Rows8(*fp8_quantize_rows(x, None))
        # Fast sums forward alone, as in NVIDIA's Transformer Engine: gradients sum over the more, 28,672 in 8B.
        output: Tensor = fp8_matmul(*rows8, weight, scale[None], fast=True)
        return output if bias is None else output.add_(bias)

    def gradient(self, d_output: Tensor) -> Tensor:
        # The scales of W's rows lie along the summed dimension here: the gradient takes them before it is quantized.
        weight, scale = self._weight(transposed=True)
        d_x: Tensor = fp8_matmul(*fp8_quantize_rows(d_output, scale), weight, self.unit)
        return d_x

    def hold(self, holding: bool, *, one_gradient: bool = False) -> None:
        """Both directions want a layout of their own, so one of each has nothing to share."""
        self.holding = holding and not one_gradient
        self.held.clear()

    def follow(self, ready: Callable[[], None]) -> None:
        self.ready = ready

    def _weight(self, *, transposed: bool) -> tuple[Tensor, Tensor]:
        if transposed in self.held:
            return self.held[transposed]
        made = self.materialize(transposed=transposed)
        if self.holding:
            self.held[transposed] = made
        return made

    def materialize(self, *, transposed: bool) -> tuple[Tensor, Tensor]:
        """The weights (out, in), or (in, out), and the scales of W's rows, (out,)."""
        if self.ready is not None:
            self.ready()
        shape = self.shape[::-1] if transposed else self.shape
        weight = torch.empty(shape, dtype=E4M3, device=self.unit.device)
        scale = torch.empty(self.shape[0], device=self.unit.device)
        rows = torch.split(weight.t() if transposed else weight, self.out_features)
        for linear, values, row_scale in zip(self.linears, rows, torch.split(scale, self.out_features), strict=True):
            _quantize_into(linear, values, row_scale)
        return weight, scale


def _quantize_into(linear: Linear, values: Tensor, row_scale: Tensor) -> None:
    if isinstance(linear, DenseLinear):
        fp8_quantize_weight_into(values, row_scale, linear.dequantize(linear.compute_dtype))
        return
    held = linear.nf4_weight
    sizes = {"block_size": held.spec.block_size, "group_size": held.spec.group_size}
    nf4_dequantize_fp8_into(values, row_scale, held.codes, held.absmax, held.group_absmax, held.offset, **sizes)


def _require_fp8_sizes(linears: Sequence[Linear]) -> None:
    for linear in linears:
        odd = linear.out_features % 16 or linear.in_features % 16
        if odd or (isinstance(linear, NF4Linear) and linear.in_features % linear.spec.block_size):
            size = f"{linear.out_features} x {linear.in_features}"
            raise CannotFuseError(f"products in fp8 need multiples of 16 and rows of whole NF4 blocks, not {size}")
