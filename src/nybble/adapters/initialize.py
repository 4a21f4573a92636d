"""How a low-rank pair begins, other than at zero.

calibrated: at a correction of what quantizing left of the weight, by a text (quant/correction.py).
pissa: at the principal part of the weight, which is taken out of the base (arXiv 2404.02948).
loftq: at the principal part of what quantizing leaves; some of it is taken out first, by turns (arXiv 2310.08659).

Legend: out, in = the layer's features; r = rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from nybble.adapters.config import LoraConfig
from nybble.adapters.inject import adapter_config, adapter_slots
from nybble.adapters.lora import LoRAAdapter
from nybble.adapters.start import Factors
from nybble.errors import UserError
from nybble.quant.correction import Correction, read_corrections
from nybble.quant.linear import NF4Linear

LOFTQ_ROUNDS = 5  # as in the paper

# Of the search for leading singular vectors: more columns than are wanted, and products with the matrix.
_OVERSAMPLING = 16
_ROUNDS = 8

# The norm of a row of A in a plain start, which is uniform in +-1/sqrt(in).
_ROW_NORM = 1 / math.sqrt(3)


def calibrated_start(model: nn.Module, folder: Path, *, name: str = "default") -> dict[str, Factors]:
    """The corrections in a prepared `folder` for the quantized layers that adapter `name` has, each of its own rank.

    Raises UserError when no layer that it adapts is in NF4, and when the folder brings no correction for one.
    """
    paths = [path for path, slot, _ in _adapted(model, name) if isinstance(slot.base, NF4Linear)]
    if not paths:
        what = "no layer of the adapter is in NF4, so there is nothing that quantizing left"
        raise UserError(what, where="lora.init=calibrated", fix="Use method qlora on a prepared folder, or init plain.")
    config = adapter_config(model, name)
    corrections = read_corrections(folder, paths)
    return {path: calibrated(corrections[path], config.at(path)) for path in paths}


def calibrated(correction: Correction, config: LoraConfig) -> Factors:
    """The pair whose product is the correction of rank r.

    Rows of A have the norm that they have in a plain start: steps of B then count as much, so that a learning rate that
    suits one start suits the other.
    """
    best = correction.rank(config.r)
    norms = torch.linalg.vector_norm(best.V.float(), dim=1)
    kept = norms > 0
    U, V, norms = best.U[:, kept].float(), best.V[kept].float(), norms[kept]
    A = V * (_ROW_NORM / norms).unsqueeze(1)
    return Factors(A, U * (norms / (_ROW_NORM * config.scaling)), config.scaling)


def principal(matrix: Tensor, config: LoraConfig, generator: torch.Generator) -> Factors:
    """The pair whose product is the best approximation of rank r to `matrix` (out, in), its norm in both halves."""
    U, S, V = leading_singular(matrix.float(), config.r, generator)
    half = (S / config.scaling).sqrt()
    return Factors(V * half.unsqueeze(1), U * half, config.scaling)


def loftq(
    weight: Tensor,
    config: LoraConfig,
    generator: torch.Generator,
    quantize: Callable[[Tensor], Tensor],
    held: Callable[[Factors], Factors],
) -> tuple[Factors, Factors | None]:
    """The pair that a layer starts from, and what is to be taken out of its weight (out, in) before that is quantized.

    quantize: a weight -> what a reader finds; held: factors as an adapter has them, which may round them.
    """
    removed: Factors | None = None
    initial: Factors | None = None
    for _ in range(LOFTQ_ROUNDS):
        removed = initial
        residual = weight.float() if removed is None else removed.taken_out_of(weight)
        initial = held(principal(weight.float() - quantize(residual), config, generator))
    assert initial is not None
    return initial, removed


def leading_singular(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), S (r,) and V (r, in) of the leading singular values, r = min(rank, out, in).

    By subspace iteration from a random start (arXiv 0909.4061, algorithm 4.4): some products with the matrix instead of
    a whole decomposition, which takes seconds for 4096 x 14336.
    """
    columns = min(rank + _OVERSAMPLING, *matrix.shape)
    start = torch.randn(matrix.shape[1], columns, generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start)[0]
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis)[0])[0]
    U, S, V = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    return (basis @ U)[:, :rank], S[:rank], V[:rank]


@torch.no_grad()
def set_start(model: nn.Module, start: Mapping[str, Factors], *, name: str = "default") -> None:
    """Have the fresh adapter `name` begin at `start`, by path. What is beyond its rank stays plain."""
    for path, _, adapter in _adapted(model, name):
        if path in start:
            rank = start[path].A.shape[0]
            adapter.lora_A[:rank].copy_(start[path].A)
            adapter.lora_B[:, :rank].copy_(start[path].B)


def held_start(model: nn.Module, *, name: str = "default") -> dict[str, Factors]:
    """Copies, on the CPU, of what the pairs of adapter `name` hold, by path."""
    return {
        path: Factors(adapter.lora_A.detach().cpu().clone(), adapter.lora_B.detach().cpu().clone(), adapter.scaling)
        for path, _, adapter in _adapted(model, name)
    }


def _adapted(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, LoRAAdapter]]:
    for path, slot in adapter_slots(model):
        part = dict(slot.adapters.items()).get(name)
        if isinstance(part, LoRAAdapter):
            yield path, slot, part
