"""Inputs of `split_rope` and `split_rope_backward`, and the same sums as Transformers' models compute them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb


@dataclass(frozen=True)
class Case:
    """A kind of heads, and what is done with them; rank 0: nothing is adapted; offset None: no norms."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    rank: int = 0
    parts: int = 1
    offset: float | None = None

    @property
    def sizes(self) -> list[int]:
        return [count * self.head_dim for count in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]


# SmolLM2 (9 and 3 heads of 64); Phi-3 (96; packed, so one pair for all; and with partial rotation); Qwen3; Gemma 3.
CASES = [
    Case(9, 3, 64, 64),
    Case(9, 3, 64, 64, rank=16, parts=3),
    Case(3, 3, 96, 96, rank=5, parts=1),
    Case(3, 1, 96, 48, rank=8, parts=3),
    Case(3, 1, 128, 96, rank=16, parts=1, offset=0.0),
    Case(5, 1, 128, 128, rank=80, parts=3, offset=0.0),
    Case(2, 1, 256, 256, rank=128, parts=3, offset=1.0),
    Case(4, 2, 256, 256, offset=1.0),
    Case(2, 1, 8, 8, rank=2, parts=3, offset=0.0),
]


@dataclass(frozen=True)
class Inputs:
    """Random tensors of a case. One weight of the norms is zero, where dividing by weights would fail."""

    case: Case
    qkv: Tensor
    narrow: Tensor | None
    B: Tensor | None
    cos: Tensor
    sin: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    gradients: tuple[Tensor, Tensor, Tensor]

    def to(self, *target: Any) -> Inputs:
        moved = {name: None if value is None else value.to(*target) for name, value in self._tensors().items()}
        d_q, d_k, d_v = (gradient.to(*target) for gradient in self.gradients)
        return Inputs(self.case, gradients=(d_q, d_k, d_v), **moved)

    def forward(self) -> tuple[Any, ...]:
        """The arguments of `split_rope`."""
        case = self.case
        adapter = self.narrow, self.B, 0.7, case.parts
        rotation = self.cos, self.sin, case.num_heads, case.num_kv_heads
        return self.qkv, *adapter, *rotation, *self._norms()

    def backward(self) -> tuple[Any, ...]:
        """The arguments of `split_rope_backward`."""
        angles = self.cos, self.sin
        if self.q_norm is None:
            return *self.gradients, *angles
        return *self.gradients, *angles, self.qkv, self.narrow, self.B, 0.7, self.case.parts, *self._norms()

    def _norms(self) -> tuple[Any, ...]:
        return self.q_norm, self.k_norm, 1e-6, self.case.offset or 0.0

    def _tensors(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("qkv", "narrow", "B", "cos", "sin", "q_norm", "k_norm")}


def make_inputs(case: Case, tokens: int, dtype: torch.dtype = torch.float64) -> Inputs:
    generator = torch.Generator().manual_seed(tokens)

    def rounded(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)

    width = sum(case.sizes)
    angle = rounded(tokens, case.rotary_dim // 2).double().mul(3).repeat(1, 2)
    narrow, B = (rounded(tokens, case.parts * case.rank), rounded(width, case.rank)) if case.rank else (None, None)
    norms = None, None
    if case.offset is not None:
        norms = rounded(case.head_dim), rounded(case.head_dim)
        norms[0][1] = norms[1][3] = -case.offset
    counts = case.num_heads, case.num_kv_heads, case.num_kv_heads
    d_q, d_k, d_v = (rounded(tokens, count, case.head_dim) for count in counts)
    angles = angle.cos().to(dtype), angle.sin().to(dtype)
    return Inputs(case, rounded(tokens, width), narrow, B, *angles, *norms, (d_q, d_k, d_v))


def definition(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, step by step in the dtype of the inputs."""
    case, x = inputs.case, inputs.qkv
    if inputs.narrow is not None and inputs.B is not None:
        rows = inputs.B.split(case.sizes if case.parts == 3 else len(inputs.B))
        parts = zip(inputs.narrow.chunk(case.parts, 1), rows, strict=True)
        x = x + 0.7 * torch.cat([narrow @ B.T for narrow, B in parts], 1)
    q, k, v = (part.unflatten(1, (-1, case.head_dim)) for part in x.split(case.sizes, 1))
    if inputs.q_norm is not None and inputs.k_norm is not None:
        q = rms_norm(q, (case.head_dim,), inputs.q_norm + case.offset, 1e-6)
        k = rms_norm(k, (case.head_dim,), inputs.k_norm + case.offset, 1e-6)
    q, k = apply_rotary_pos_emb(q, k, inputs.cos, inputs.sin, unsqueeze_dim=1)
    return q, k, v


def definition_backward(inputs: Inputs) -> Tensor:
    """The gradient of qkv by autograd."""
    qkv = inputs.qkv.detach().requires_grad_()
    heads = definition(Inputs(**(inputs.__dict__ | {"qkv": qkv})))
    return torch.autograd.grad(heads, qkv, inputs.gradients)[0]


def assert_exact_enough(found: tuple[Tensor, ...], inputs: Inputs) -> None:
    """q, k, v and the gradient, against float64: at most twice the error of PyTorch in the dtype of the inputs.

    In half precision, no more than that of rounding the exact values once: fp32 adds at most 2^-13 of it.
    """
    exact, stepwise = ((*definition(i), definition_backward(i)) for i in (inputs.to(torch.float64), inputs))
    for mine, of_pytorch, right in zip(found, stepwise, exact, strict=True):
        dtype = mine.dtype
        error, pytorchs, roundings = ((x.cpu().double() - right).norm() for x in (mine, of_pytorch, right.to(dtype)))
        assert error <= 2 * pytorchs
        assert dtype == torch.float32 or error <= 1.01 * roundings
