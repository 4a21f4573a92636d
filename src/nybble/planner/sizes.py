"""Bytes of what a run's tensors are, one by one, as `nybble.quant`, `nybble.optim` and the fused regions make them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from nybble.planner.run_shape import RunShape
from nybble.planner.shapes import LinearShape, ModelShape

_FP32 = 4
_OPTIMIZER_BLOCK = 256  # values to whose multiples FlatAdamW rounds a parameter, and which share an 8-bit scale


@dataclass(frozen=True)
class Product:
    """One projection of a block: the linears that read one input, as one matrix with the pairs beside it."""

    linears: tuple[LinearShape, ...]
    inputs: int
    outputs: int
    parts: int  # pairs; 0: nothing is adapted
    rank: int

    @classmethod
    def of(cls, linears: tuple[LinearShape, ...], run: RunShape) -> Product:
        parts = 0 if run.method == "full" else sum(linear.name in run.targets for linear in linears)
        return cls(linears, linears[0].inputs, sum(linear.outputs for linear in linears), parts, run.rank)

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs

    @property
    def narrow(self) -> int:
        """Columns of x A^T."""
        return self.parts * self.rank


@dataclass(frozen=True)
class Sizes:
    model: ModelShape
    run: RunShape

    @cached_property
    def products(self) -> tuple[Product, Product, Product, Product]:
        """Of q, k and v; of attention's output; of gate and up; down."""
        qkv, output, gate_up, down = (Product.of(linears, self.run) for linears in self.model.projections)
        return qkv, output, gate_up, down

    @property
    def value(self) -> int:
        """Bytes of an activation."""
        return self.run.compute_bytes

    def of_linear(self, linear: LinearShape) -> Iterator[int]:
        """Bytes of each tensor that holds the weight."""
        if self.run.method != "qlora":
            yield linear.weights * self.run.storage_bytes
        else:
            yield from self._in_nf4(linear.weights)

    def _in_nf4(self, weights: int) -> Iterator[int]:
        spec = self.run.nf4
        yield -(-weights // 2)
        if not spec.double_quant:
            yield spec.num_blocks(weights) * _FP32
            return
        yield spec.num_blocks(weights)
        yield spec.num_groups(weights) * _FP32
        yield _FP32

    @cached_property
    def layer_weights(self) -> int:
        """Bytes of one block's frozen matrices."""
        return sum(sum(self.of_linear(linear)) for linear in self.model.linears)

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one matrix."""
        return self.model.tied and not self.run.nf4_head

    @property
    def head(self) -> tuple[int, ...]:
        """Bytes of each tensor that holds the head, where it is not the embedding."""
        return tuple(self._in_nf4(self.model.embedding_weights)) if self.run.nf4_head else (self.vocabulary_matrix,)

    @property
    def vocabulary_matrix(self) -> int:
        """Bytes of the embedding, or of a head that is held alike."""
        return self.model.embedding_weights * self.run.storage_bytes

    def materialized(self, product: Product) -> int:
        """Bytes of a weight as it is multiplied, 0 if it is held so."""
        if self.run.precision == "fp8" and self.run.is_fused(self.model):
            return product.weights
        held_so = self.run.method != "qlora" and self.run.storage_bytes == self.run.compute_bytes
        return 0 if held_so else product.weights * self.value

    def units(self, product: Product) -> int:
        """Bytes of an NF4 weight's scales in fp32, on its way to fp8: of the largest linear, one after another."""
        if self.run.method != "qlora":
            return 0
        return max(self.run.nf4.num_blocks(linear.weights) for linear in product.linears) * _FP32

    @cached_property
    def trained_values(self) -> int:
        """Trained parameters as FlatAdamW lays them out, each to a multiple of 256 values."""
        if self.run.method == "full":
            return self.model.parameters
        rank = self.run.rank
        pairs = [linear for product in self.products for linear in product.linears if linear.name in self.run.targets]
        sides = [side for linear in pairs for side in (linear.inputs, linear.outputs)]
        blocks = sum(math.ceil(rank * side / _OPTIMIZER_BLOCK) for side in sides)
        return self.model.num_layers * blocks * _OPTIMIZER_BLOCK

    @property
    def trained(self) -> int:
        """Bytes of all trained parameters, and of their gradients."""
        return self.trained_values * self.run.trained_bytes

    @property
    def moments(self) -> tuple[int, ...]:
        """Bytes of each tensor that holds moments."""
        if self.run.state_bits == 32:
            return 2 * (self.trained_values * _FP32,)
        return 2 * (self.trained_values, self.trained_values // _OPTIMIZER_BLOCK * _FP32)

    def pair_copies(self) -> Iterator[int]:
        """Bytes of A and of B of each projection of a block, in the compute dtype."""
        for product in self.products:
            if product.parts:
                adapted = sum(linear.outputs for linear in product.linears if linear.name in self.run.targets)
                yield product.narrow * product.inputs * self.value
                yield adapted * product.rank * self.value
